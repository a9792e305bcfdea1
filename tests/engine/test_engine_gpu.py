"""The same on a GPU of CUDA, where there is one: recorded steps, and a step in which the host waits for nothing."""

from pathlib import Path

import pytest
import torch
from chain import random_ids
from checkpoints import tiny
from ralmq.workers.engine.device import fetch, upload
from ralmq.workers.engine.draw import draw
from ralmq.workers.engine.sample import SamplingParams
from ralmq.workers.engine.span import Row, Span

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA here")
SAMPLED = [SamplingParams(), SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=3)]


def decoded(span: Span, steps: int) -> torch.Tensor:
    """Hidden states [steps, 2, hidden] of two rows, in the host's memory."""
    tables = [[0, 1, 2], [3, 4, 5]]
    span.forward([Row(0, 20, table) for table in tables], random_ids(40))
    made = [span.forward([Row(20 + n, 1, table) for table in tables], random_ids(2, n)) for n in range(steps)]
    return torch.stack([fetch(hidden) for hidden in made])


def test_there_and_back() -> None:
    """Numbers and tensors; on a CPU nothing is copied that is there already."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for values in ([3, 1, 2], [[0.5, 1.5]], torch.arange(5)):
        moved = upload(values, device)
        assert moved.device.type == device.type
        assert torch.equal(fetch(moved), torch.as_tensor(values))
    here = torch.arange(4)
    assert upload(here, torch.device("cpu")).data_ptr() == fetch(here).data_ptr() == here.data_ptr()


@cuda
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral"])
def test_recorded_steps_are_those_of_a_cpu(family: str, tmp_path: Path) -> None:
    path = tiny(family, tmp_path)
    wanted = decoded(Span.load(path, 0, 4, blocks=8), 10)
    for graphs in (None, False):
        span = Span.load(path, 0, 4, blocks=8, device="cuda", graphs=graphs)
        assert (span._decoder is not None) is (graphs is None and family != "mixtral")
        assert (decoded(span, 10) - wanted).abs().max() < 1e-3
        if span._decoder is not None:
            assert span._decoder.shapes == [(2, 4)] and not span._decoder._broken


@cuda
def test_the_host_waits_for_nothing_but_the_ids(tmp_path: Path) -> None:
    span = Span.load(tiny("llama", tmp_path), 0, 4, blocks=8, device="cuda")
    decoded(span, 2)  # records
    ids = random_ids(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for position in range(22, 30):
            rows = [Row(position, 1, [0, 1, 2]), Row(position, 1, [3, 4, 5])]
            hidden = span.forward(rows, ids)
            made = draw(span.head(hidden, [0, 1]), SAMPLED, [position + 1] * 2)
        torch.cuda.set_sync_debug_mode("default")
        assert fetch(made).shape == (2, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
