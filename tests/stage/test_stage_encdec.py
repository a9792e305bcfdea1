"""Encoder states on their way: what the leader puts into STEPs, what stages read there, what the last one counts."""

import numpy as np
import pytest
import torch
from engine.t5_models import t5
from ralmq.schema.codec import decode, encode
from ralmq.schema.message import Step
from ralmq.workers.engine.t5_span import CrossRow
from ralmq.workers.params import Task
from ralmq.workers.stage.batch import Sequence
from ralmq.workers.stage.cross import before, cross_rows, onward, remember, step_of
from ralmq.workers.stage.leader import Leader
from ralmq.workers.stage.weights import Loaded, load, place_of


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path = t5("v1.0", tmp_path_factory.mktemp("t5") / "t5", decoder_start_token_id=3)
    return load(place_of(str(path), "0/2", "", "m"), "cpu", "fp32", 8, 4)


def states(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 48)).astype(np.float32)


def sequence(number: int, made: np.ndarray, ids: list[int]) -> Sequence:
    tokens = [3] * len(made) + ids
    found = Sequence(bytes([number]) * 16, 0, tokens, {"limit": 4}, len(tokens) + 4, lambda: 0, lambda: None)
    remember(found, made)
    return found


def sent(step: Step) -> Step:
    """As the next stage gets it."""
    found: Step = decode(encode(step, id=bytes(16)))[1]
    return found


def rows_of(step: Step, first: bool) -> list[CrossRow]:
    return [row for row in cross_rows(step, first) if isinstance(row, CrossRow)]


def test_states_count_as_tokens_before_the_prompt(loaded: Loaded) -> None:
    task, ids = before(Task(context=1, max_tokens=7), [3, 9, 8], states(5), loaded)
    assert (task.context, task.prompt, task.max_tokens, ids) == (6, None, 7, [3, 3, 3, 3, 3, 3, 9, 8])
    task, _ = before(Task(context=1, prompt=2), [3, 9, 8], states(5), loaded)
    assert (task.context, task.prompt) == (6, 7)


def test_a_step_carries_the_states_that_are_among_its_rows() -> None:
    """In chunks of 8 tokens: 20 states and 2 ids, then 3 states and 2 ids."""
    many = [states(20, 1), states(3, 2)]
    leader = Leader(1, 16, 4, chunk=8)
    for number, made in enumerate(many):
        leader.add(sequence(number, made, [3, 30 + number]))
    found: list[list[tuple[int, int, int]]] = []
    given: list[list[np.ndarray]] = [[], []]
    shapes: set[tuple[int, bool]] = set()
    while (batch := leader.next()) is not None:
        step = sent(step_of(batch))
        rows = rows_of(step, True)
        for row, where in zip(rows, step.rows, strict=True):
            assert row.remembered == (0 if row.states is None else len(row.states))
            if row.states is not None:
                given[where.id[0]].append(row.states.numpy())
        found.append([(row.position, row.count, row.cross) for row in rows])
        hidden = np.zeros((sum(row.count for row in rows), 48), np.float32)
        later = sent(Step(step.rows, step.starts, tensors=[hidden, *onward(step)]))
        assert [row.cross for row in rows_of(later, False)] == [row.cross for row in rows]
        shapes.add((len(later.tensors), bool(step.starts)))
        leader.returned(batch.number, [])
    assert found == [[(0, 8, 20)], [(8, 8, 20)], [(16, 6, 20), (0, 2, 3)], [(2, 3, 3)]]
    assert all(np.array_equal(np.concatenate(parts), made) for parts, made in zip(given, many, strict=True))
    assert shapes == {(3, True), (2, False)}  # hidden states, prompts where sequences start, counts; no states


def test_blocks_are_shared_by_equal_states_with_equal_tokens_alone() -> None:
    one, same, other = (sequence(place, states(20, seed), [3, 5]) for place, seed in enumerate((1, 1, 2)))
    plain = Sequence(bytes(16), 0, list(one.tokens), {}, 30, lambda: 0, lambda: None)
    assert one.keys_of(1) == same.keys_of(1)
    assert len({tuple(found.keys_of(1)) for found in (one, other, plain)}) == 3


def test_a_row_without_its_states_is_an_error_and_not_noise(loaded: Loaded) -> None:
    for given in (None, torch.zeros(1, 48)):
        with pytest.raises(ValueError, match="rows hold 2 encoder states"):
            loaded.span.forward([CrossRow(0, 3, [0], 2, given)], torch.tensor([3, 3, 4]))
