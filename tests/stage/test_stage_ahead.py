"""What the last stage draws where the logits are: the same as in the host's memory, in one use of the head."""

from typing import Any

import numpy as np
import pytest
import torch
from ralmq.schema.message import Error, Partial, Return, Row
from ralmq.workers.stage.ahead import ahead, finite_rows
from ralmq.workers.stage.last import NOT_FINITE
from stage.table import HIDDEN, Head, Ways, key_of, new, start, step

# Of each kind of row one that is drawn ahead, or why it is not.
TASKS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"temperature": 1.0, "seed": 4}, True),
    ({"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.01, "seed": 9, "logprobs": True}, True),
    ({"top_logprobs": 3}, False),
    ({"logit_bias": {3: 4.0}}, False),
    ({"repetition_penalty": 1.5}, False),
    ({"retrieve": {"index": "docs"}}, False),
    ({"retrieve": {"index": "docs", "interval": 4}}, False),
]


def drawn(where: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[Any, Any], list[int]]:
    """All rows of one step: their parts, and how many rows each use of the head had."""
    monkeypatch.setattr(Ways, "ahead", where)
    used: list[int] = []
    whole = Head.head

    def head(self: Head, hidden: torch.Tensor, want: Any = None) -> torch.Tensor:
        used.append(len(want))
        return whole(self, hidden, want)

    monkeypatch.setattr(Head, "head", head)
    last = new()
    keys = [start(last, number, 3 + number, **task) for number, (task, _) in enumerate(TASKS)]
    # The last sequence is a chunk that does not reach its end.
    chunk = start(last, 99, 30)
    outcome = step(last, *[(key, 0, 3 + number) for number, key in enumerate(keys)], (chunk, 0, 20))
    parts = {key: message.body for message, key, _ in outcome.sent if isinstance(message, Partial)}
    assert sorted(parts) == sorted(key for key, (task, _) in zip(keys, TASKS, strict=True) if "retrieve" not in task)
    monkeypatch.setattr(Head, "head", whole)
    return parts, used


def test_rows_are_drawn_as_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    (here, one), (there, two) = (drawn(where, monkeypatch) for where in (False, True))
    assert {key: {**body, "logprob": 0} for key, body in here.items()} == {
        key: {**body, "logprob": 0} for key, body in there.items()
    }
    for key, body in here.items():
        assert ("logprob" in body) == ("logprob" in there[key])
        assert abs(body.get("logprob", 0.0) - there[key].get("logprob", 0.0)) < 1e-6
    early = sum(alone for _, alone in TASKS)
    assert one == [len(TASKS)] and two == [early, len(TASKS) - early]


def test_rows_that_are_not_finite_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ways, "ahead", True)
    last = new()
    keys = [start(last, number, 2) for number in range(4)]
    rows = tuple(Row(*key, 0, 2, ()) for key in keys)
    hidden = HIDDEN[:8].clone()
    hidden[3, 1] = float("inf")
    hidden[4, 0] = float("nan")  # not in the token that is sampled from
    outcome = last.step(rows, hidden, hidden)
    failed = [key for message, key, _ in outcome.sent if isinstance(message, Error) and message.message == NOT_FINITE]
    assert failed == [keys[1], keys[2]]
    assert [key for message, key, _ in outcome.sent if isinstance(message, Partial)] == [keys[0], keys[3]]
    assert {(row.id, row.attempt) for row in outcome.returns if row == Return(row.id, row.attempt, -1, True)} == set(
        failed
    )


def test_finite_rows_are_found_alike() -> None:
    """A step with no sequence that is known, too."""
    rows = tuple(Row(*key_of(number), 0, length, ()) for number, length in enumerate((3, 1, 5, 2)))
    for broken in ([], [0], [3], [2, 10], list(range(11))):
        hidden = HIDDEN[:11].clone()
        hidden[broken, 2] = float("nan")
        wanted = finite_rows(rows, hidden)
        found = ahead(Head(), rows, hidden, {})  # type: ignore[arg-type]
        assert np.array_equal(found.finite, wanted) and not found.drawn
        assert wanted.tolist() == [not set(part) & set(broken) for part in ([0, 1, 2], [3], range(4, 9), [9, 10])]
