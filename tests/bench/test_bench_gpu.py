"""The bench of the GPU, small and on a CPU: what it runs is what a GPU runs, and both engines give the same tokens."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import VOCAB
from ralmq.bench import gpu
from ralmq.bench.gpu import OURS, PROMPT, THEIRS, Shape, main, measure, ours, theirs, write_llama
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.engine.span import Span

SMALL = Shape(2, 64, 4, 2, 96, VOCAB, 256)


def test_the_model_is_one_that_transformers_reads(tmp_path: Path) -> None:
    """Its tokens are ours."""
    write_llama(tmp_path / "m", SMALL)
    span = Span.load(tmp_path / "m", 0, 2, blocks=3 * 4, graphs=True)
    reference = theirs(tmp_path / "m", "cpu", torch.float32)
    assert reference is not None
    prompts = torch.randint(2, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    assert ours(span, 4)(prompts, 12) == reference(prompts, 12)
    decoder = span._decoder
    assert decoder is not None and decoder.shapes == [(4, 4)]


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate for each engine and batch; the steps leave the prompt out."""
    monkeypatch.setattr(gpu, "PROMPT", BLOCK)
    rates = measure("small", SMALL, "cpu", batches=(1, 3), tokens=4, rounds=2)
    assert [(rate.engine, rate.batch) for rate in rates] == [(OURS, 1), (THEIRS, 1), (OURS, 3), (THEIRS, 3)]
    assert all(rate.tokens_per_s > 0 and rate.floor_ms > 0 and rate.device == "cpu" for rate in rates)
    assert all(rate.ratio == 1.0 for rate in rates if rate.engine == THEIRS)
    assert PROMPT % BLOCK == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == "no GPU of CUDA here: nothing is measured\n"
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"bench": "gpu", "rows": []}
