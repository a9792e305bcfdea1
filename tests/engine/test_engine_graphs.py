"""Steps of fixed shapes: what pads them changes nothing, each shape is recorded once, and what cannot be is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chain import random_ids
from checkpoints import CONTEXT, tiny
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.graphs import BATCHES, Decoder, Pair
from ralmq.workers.engine.kv import KVCache
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.engine.span import Row, Span

BOUND = 1e-5
DENSE = ("gpt2", "opt", "llama", "qwen3", "gemma2", "gemma3_text", "phi3")


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() <= BOUND * max(1.0, float(wanted.abs().max()))


def decoder(span: Span) -> Decoder:
    assert span._decoder is not None
    return span._decoder


@pytest.mark.parametrize("family", DENSE)
def test_padded_steps_give_what_plain_ones_give(family: str, tmp_path: Path) -> None:
    """Batches of 1 to 9 rows at very different positions, windows included; both ways keep the same cache."""
    path = tiny(family, tmp_path)
    plain, padded = (Span.load(path, 0, 4, blocks=64, graphs=graphs) for graphs in (False, True))
    lengths = [1, 5, 16, 17, 40, 100, 31, 2, 64]
    tables = [list(range(7 * row, 7 * row + 7)) for row in range(len(lengths))]
    prompts = [random_ids(n, n) for n in lengths]
    for span in (plain, padded):
        for prompt, table in zip(prompts, tables, strict=True):
            span.forward([Row(0, len(prompt), table)], prompt)
    for batch in (1, 3, 9):
        for step in range(3):
            rows = [Row(lengths[row] + step, 1, tables[row]) for row in range(batch)]
            x = random_ids(batch, 100 * batch + step)
            wanted, fed = plain.forward(rows, x, ffn_input=True)
            got, also = padded.forward(rows, x, ffn_input=True)
            close(got, wanted)
            close(also, fed)
            close(padded.head(got), plain.head(wanted))
    assert {rows for rows, _ in decoder(padded).shapes} <= {1, 2, 4, 16}
    for mine, theirs in zip(plain._cache._layers, padded._cache._layers, strict=True):
        close(theirs[: plain.blocks], mine[: plain.blocks])


def test_a_middle_span_takes_hidden_states(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path)
    plain, padded = (Span.load(path, 1, 3, blocks=8, graphs=graphs) for graphs in (False, True))
    for position in range(20):
        x = torch.randn(3, 64)
        rows = [Row(position, 1, [2 * row, 2 * row + 1]) for row in range(3)]
        close(padded.forward(rows, x), plain.forward(rows, x))


def test_hidden_states_may_come_in_another_dtype_than_before(tmp_path: Path) -> None:
    """A neighbour that sends fewer bytes makes way for one that sends all of them."""
    path = tiny("llama", tmp_path)
    plain, padded = (Span.load(path, 1, 3, blocks=8, graphs=graphs) for graphs in (False, True))
    rows, x = [Row(0, 1, [0])], torch.randn(1, 64) * 1e5  # beyond float16
    padded.forward(rows, torch.ones(1, 64, dtype=torch.float16))
    close(padded.forward(rows, x), plain.forward(rows, x))


class Counting:
    """Records as a device would: what is recorded reads and writes the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], Pair]) -> Callable[[], Pair]:
        self.recorded += 1
        made = tuple(tensor.clone() for tensor in run())

        def replay() -> Pair:
            self.replayed += 1
            for kept, new in zip(made, run(), strict=True):
                kept.copy_(new)
            return made[0], made[1]

        return replay


def test_each_shape_is_recorded_once_and_results_stay(tmp_path: Path) -> None:
    span = Span.load(tiny("llama", tmp_path), 0, 4, blocks=64, graphs=True)
    record = Counting()
    decoder(span)._record = record
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for position in range(CONTEXT - 1):
        got = span.forward([Row(position, 1, list(range(16)))], random_ids(1, position))
        results.append((got, got.clone()))
    # A few widths of block tables, up to the context: 4, 8 and 16 blocks.
    assert decoder(span).shapes == [(1, 4), (1, 8), (1, 16)]
    assert record.recorded == 3 and record.replayed == CONTEXT - 1
    assert all(torch.equal(kept, then) for kept, then in results), "a result is no part of what is replayed"
    assert span.computed == 4 * (CONTEXT - 1)


def test_what_is_not_padded(tmp_path: Path) -> None:
    """Prompts, more rows than the largest shape, experts, ranks, a fixed shape of its own."""
    path = tiny("llama", tmp_path / "llama")
    span = Span.load(path, 0, 4, blocks=80, graphs=True)
    span.forward([Row(0, 3, [0]), Row(0, 1, [1])], random_ids(4))
    many = BATCHES[-1] + 1
    span.forward([Row(0, 1, [row]) for row in range(many)], random_ids(many))
    assert decoder(span).shapes == []
    assert Span.load(path, 0, 4, blocks=1, graphs=True, deterministic=4)._decoder is None
    assert Span.load(path, 0, 4, blocks=1, graphs=True, shard=(0, 2))._decoder is None
    assert Span.load(path, 0, 4, blocks=1)._decoder is None, "on a CPU only where it is asked for"
    assert Span.load(tiny("mixtral", tmp_path / "experts"), 0, 4, blocks=1, graphs=True)._decoder is None


def test_a_device_that_records_nothing_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny("llama", tmp_path)
    span, plain = (Span.load(path, 0, 4, blocks=4, graphs=graphs) for graphs in (True, False))

    def fail(run: Callable[[], Pair]) -> Callable[[], Pair]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    decoder(span)._record = fail
    for position in range(3):
        rows, x = [Row(position, 1, [0])], random_ids(1, position)
        assert torch.equal(span.forward(rows, x), plain.forward(rows, x))
    (record,) = caplog.records
    assert record.getMessage() == "steps are not recorded on cpu: operation not permitted when stream is capturing"


def test_padding_writes_into_the_spare_block_alone(tmp_path: Path) -> None:
    path = tiny("llama", tmp_path, 1)
    config = read_config(path)
    cache = KVCache(1, 3, config.kv_heads, config.head_dim, torch.float32, "cpu", spare=1)
    written: list[torch.Tensor] = []
    made = Decoder(config, None, cache, torch.float32, lambda run: run)

    def layers(x: torch.Tensor, step: object) -> Pair:
        written.append(step.slots.clone())  # type: ignore[attr-defined]
        return x, x

    rows = [Row(16, 1, [2, 0]), Row(3, 1, [1]), Row(0, 1, [2])]
    made.run(rows, torch.arange(3), layers)
    assert written[0].tolist() == [0, BLOCK + 3, 2 * BLOCK, 3 * BLOCK]
