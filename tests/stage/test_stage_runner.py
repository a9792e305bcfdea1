"""One STEP through a stage's computation, and what is left of it where that raises."""

from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from ralmq.schema.message import Active, Error, Partial, Return, Row, Start, Step
from ralmq.workers.engine.errors import RankLost
from ralmq.workers.params import Task
from ralmq.workers.stage.runner import Runner

KEYS = [(bytes([n]) * 16, n) for n in range(3)]
PARAMS = {"task": msgpack.packb(Task(max_tokens=5).model_dump(exclude_defaults=True)), "limit": 5}


class Layers:
    """A span that adds one to what enters it, and raises where told to."""

    config = SimpleNamespace(eos_ids=(), hidden=4, context=64, vocab=4)
    device = torch.device("cpu")
    is_first = True

    def __init__(self, is_last: bool) -> None:
        self.is_last = is_last
        self.error: Exception | None = None

    def forward(self, rows: Any, x: torch.Tensor, ffn_input: bool = False) -> Any:
        if self.error is not None:
            raise self.error
        hidden = x[:, None].repeat(1, 4).float() + 1 if x.ndim == 1 else x + 1
        return (hidden, hidden) if ffn_input else hidden

    def head(self, hidden: torch.Tensor, want: list[int]) -> torch.Tensor:
        return hidden[torch.tensor(want)]


def made(is_last: bool) -> tuple[Runner, Layers]:
    layers = Layers(is_last)
    return Runner(layers, "m", "print"), layers  # type: ignore[arg-type]


def step(*, start: bool = True) -> Step:
    """Rows of the first two keys, of 2 and 1 tokens; the third is over."""
    rows = tuple(Row(*key, 0, length, (0,)) for key, length in zip(KEYS, (2, 1), strict=False))
    starts = (Start(0, 2, PARAMS), Start(1, 1, PARAMS)) if start else ()
    tensors = [np.arange(3), np.arange(3, dtype=np.int32)] if start else [np.arange(3)]
    return Step(rows, starts, (), (Active(*KEYS[2]),), 7, tensors)


def test_a_step_goes_on_with_hidden_states_in_place_of_ids() -> None:
    runner, _ = made(is_last=False)
    onward, outcome = runner.run(step())
    assert onward is not None and not outcome.sent and not outcome.returns
    assert (onward.rows, onward.starts, onward.ended, onward.batch) == (step().rows, step().starts, step().ended, 7)
    assert torch.equal(onward.tensors[0], torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4]))
    assert np.array_equal(onward.tensors[1], np.arange(3))
    only_ended = Step(ended=(Active(*KEYS[2]),))
    assert runner.run(only_ended)[0] == only_ended
    assert runner.steps == 2 and runner.seconds > 0


def test_the_last_stage_samples_and_forgets() -> None:
    runner, _ = made(is_last=True)
    onward, outcome = runner.run(step())
    assert onward is None and runner.last is not None and len(runner.last) == 2
    assert [(type(message), key) for message, key, _ in outcome.sent] == [(Partial, key) for key in KEYS[:2]]
    assert outcome.returns == [Return(*KEYS[0], 0, False), Return(*KEYS[1], 0, False), Return(*KEYS[2], -1, True)]


def failed(outcome: Any) -> None:
    assert [key for _, key, _ in outcome.sent] == KEYS[:2]
    for message, _, _ in outcome.sent:
        assert isinstance(message, Error) and message.code == "worker_failed"
        assert message.message == "a stage of m failed: MemoryError: full (its log has the place)"


def test_where_a_stage_raises_those_behind_it_hear_that_its_rows_are_over() -> None:
    runner, layers = made(is_last=False)
    layers.error = MemoryError("full")
    onward, outcome = runner.run(step())
    failed(outcome)
    assert onward == Step(ended=(Active(*KEYS[2]), *[Active(*key) for key in KEYS[:2]]), batch=7)
    assert not outcome.returns, "they come back from the last stage"

    last, _ = made(is_last=True)
    last.run(step())
    assert onward is not None
    onward, outcome = last.run(onward)
    assert onward is None and not outcome.sent and last.last is not None and len(last.last) == 0
    assert outcome.returns == [Return(*key, -1, True) for key in (KEYS[2], *KEYS[:2])]


@pytest.mark.parametrize("start", [True, False])
def test_where_the_last_stage_raises_its_rows_are_forgotten_and_come_back(start: bool) -> None:
    runner, layers = made(is_last=True)
    if not start:
        runner.run(step())
    layers.error = MemoryError("full")
    onward, outcome = runner.run(step(start=start))
    failed(outcome)
    assert onward is None and outcome.returns == [Return(*key, -1, True) for key in (KEYS[2], *KEYS[:2])]
    assert runner.last is not None and len(runner.last) == 0
    layers.error = None
    assert [type(message) for message, _, _ in runner.run(step())[1].sent] == [Partial, Partial]


def test_a_new_pipeline_begins_with_nothing() -> None:
    runner, _ = made(is_last=True)
    runner.run(step())
    runner.reset()
    assert runner.last is not None and len(runner.last) == 0


@pytest.mark.parametrize("is_last", [False, True])
def test_a_lost_rank_is_no_fault_of_the_rows(is_last: bool) -> None:
    """Nobody is told of an error: the stage ends, and what is asked of it is asked of another."""
    runner, layers = made(is_last)
    layers.error = RankLost("rank 0 of 2 has lost one of the others")
    with pytest.raises(RankLost):
        runner.run(step())
