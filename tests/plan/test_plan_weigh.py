"""The sizes that a planner counts with are the bytes that the engine's spans hold, for every family and dtype."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from checkpoints import FAMILIES, tiny
from ralmq.errors import Refused
from ralmq.schema.plan.model import Load
from ralmq.workers.engine.span import Span
from ralmq.workers.engine.split import split
from ralmq.workers.weigh import weigh

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weigh")


@cache
def written(folder: Path, family: str, tied: bool) -> Path:
    return tiny(family, folder / f"{family}-{tied}", layers=LAYERS, tie_word_embeddings=tied)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_is_what_is_held(folder: Path, family: str, tied: bool, dtype: str) -> None:
    path = written(folder, family, tied)
    load = Load(weigh(str(path), dtype), 32)
    for first, last in ((0, 2), (1, 3), (2, LAYERS), (0, LAYERS)):
        span = Span.load(path, first, last, dtype=dtype, blocks=2)
        assert load.weights(first, last) == pytest.approx(span.bytes, rel=0.001), (first, last)
        assert load.cache(first, last) == span.kv_bytes_per_block * 2


def test_int8_is_of_matrices_alone(folder: Path) -> None:
    path = written(folder, "llama", True)
    load = Load(weigh(str(path), "int8"), 16)
    for first, last in ((0, 2), (1, 3), (2, LAYERS), (0, LAYERS)):
        span = Span.load(path, first, last, dtype="int8", blocks=1)
        assert load.weights(first, last) == pytest.approx(span.bytes, rel=0.01), (first, last)


def test_a_token_reads_the_experts_that_it_runs_through(folder: Path) -> None:
    dense = weigh(str(written(folder, "llama", False)))
    assert dense.reads == dense.layers
    sparse = weigh(str(written(folder, "mixtral", False)))
    experts = 4 * 3 * 64 * 96 * 4  # of which 2 of 4 run
    assert [held - read for held, read in zip(sparse.layers, sparse.reads, strict=True)] == [experts // 2] * LAYERS


def test_a_part_of_a_model_cannot_be_weighed(folder: Path) -> None:
    part = split(written(folder, "llama", False), 2, folder / "parts")[0]
    with pytest.raises(Refused, match="holds only a part of the model"):
        weigh(str(part))
    with pytest.raises(Refused, match="no such model directory"):
        weigh(str(folder / "nothing"))
    with pytest.raises(Refused, match="dtype fp31 is unknown"):
        weigh(str(written(folder, "llama", False)), "fp31")


def test_weighing_needs_no_torch() -> None:
    code = "from ralmq.workers.weigh import weigh; import sys; weigh('demo'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
