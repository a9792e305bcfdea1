"""A text's replay over lost stages: which losses condemn it. No socket: the pipeline is a list of what it does."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import pytest
from ralmq.client.losses import MOST, Losses
from ralmq.client.results import Reply
from ralmq.errors import DeadlineExceeded, Poisoned, RalmqError, WorkerLost
from ralmq.workers.generator.replay import Replay
from ralmq.workers.params import Task


class Attempt:
    """The answer of a pipeline: a token, and then the loss of a worker, or the end."""

    def __init__(self, tokens: int, lost: str | None, position: int, without: int = -1) -> None:
        self._parts = self._made(tokens, lost, position, without)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[Reply]:
        return self._parts

    async def _made(self, tokens: int, lost: str | None, position: int, without: int) -> AsyncIterator[Reply]:
        for place in range(tokens):
            if place != without:
                yield Reply({"token": 7, "position": position + place})
        if lost is not None:
            raise WorkerLost("it was lost", worker=lost)


def run(
    plan: Sequence[tuple[int, str | None]], alive: set[str] | RalmqError, lost: dict[str, float] | None = None
) -> tuple[int, int]:
    """Attempts that were made, and tokens that came.

    `alive`: those that the broker knows, or how it fails to say so; `lost`: others that it lost, seconds ago.
    """
    asked: list[int] = []

    async def main() -> int:
        def ask(
            body: dict[str, Any], ids: Sequence[int], *, there: bool, again: bool, context: int, states: Any = None
        ) -> Any:
            assert there == again == bool(asked) and not context
            asked.append(len(ids))
            return Attempt(*plan[len(asked) - 1], len(ids))

        async def known() -> dict[str, Any]:
            if isinstance(alive, RalmqError):
                raise alive
            gone = {**{name: 0.0 for _, name in plan[: len(asked)] if name and name not in alive}, **(lost or {})}
            return {
                "workers": [{"name": name} for name in alive],
                "lost": [{"name": name, "age_s": age} for name, age in gone.items()],
            }

        replay = Replay(ask, Task(max_tokens=8), [1, 2, 3], [], asyncio.Lock(), known)
        return len([body async for body in replay.parts()])

    try:
        return len(asked), asyncio.run(main())
    finally:
        assert asked == sorted(asked)


def attempts(plan: Sequence[tuple[int, str | None]], alive: set[str] | RalmqError) -> int:
    """After how many attempts it is given up."""
    with pytest.raises(Poisoned) as ended:
        run(plan, alive)
    return int(ended.value.message.split(" times")[0].split()[-1])


def test_three_stages_that_died_condemn_it() -> None:
    assert attempts([(0, "a"), (0, "b"), (0, "c"), (8, None)], {"d"}) == 3


def test_where_others_die_too_something_else_ends_them() -> None:
    plan = [(0, "a"), (0, "b"), (0, "c"), (0, "d"), (0, "e"), (8, None)]
    assert run(plan, set(), {"elsewhere": 0.0})[1] == 8


def test_what_died_before_says_nothing() -> None:
    with pytest.raises(Poisoned):
        run([(0, "a"), (0, "b"), (0, "c"), (8, None)], set(), {"elsewhere": 1000.0})


def test_a_stage_that_is_back_was_not_ended_by_it() -> None:
    assert run([(0, "a"), (0, "b"), (0, "c"), (0, "d"), (8, None)], {"a", "b", "d"})[1] == 8


def test_a_loss_that_names_no_stage_is_not_its_fault() -> None:
    assert run([(0, ""), (0, ""), (0, ""), (0, ""), (8, None)], set())[1] == 8


def test_those_that_died_count_whatever_came_between() -> None:
    assert attempts([(0, "a"), (0, "x"), (0, "b"), (0, "x"), (0, "c"), (8, None)], {"x"}) == 5


def test_whom_nobody_can_tell_from_the_living_condemns_nobody() -> None:
    """The broker does not say who is alive; the text goes on, but not for ever."""
    plan = [(0, name) for name in "abcdefgh"]
    assert run([*plan, (8, None)], DeadlineExceeded("no answer in time"))[1] == 8
    assert attempts([(0, "x")] * (MOST + 1), DeadlineExceeded("no answer in time")) == MOST


def test_the_last_attempt_of_all_runs_alone() -> None:
    async def main() -> list[bool]:
        losses, suspects = Losses(known), []
        for _ in range(MOST - 1):
            await losses.add(WorkerLost("it was lost", worker="x"), "its stages were")
            suspects.append(losses.suspect)
        return suspects

    async def known() -> dict[str, Any]:
        return {"workers": [{"name": "x"}], "lost": []}

    suspects = asyncio.run(main())
    assert suspects[-1] and not suspects[-2]


def test_a_token_clears_it() -> None:
    assert run([(0, "a"), (0, "b"), (1, "c"), (0, "d"), (1, "e"), (0, "f"), (6, None)], set())[1] == 8


def test_it_is_not_asked_for_ever() -> None:
    assert attempts([(0, "x")] * (MOST + 1), {"x"}) == MOST


@pytest.mark.parametrize("without", [0, 3, 7])
def test_a_token_that_was_left_out_is_asked_for_again(without: int) -> None:
    asked: list[int] = []

    def ask(
        body: dict[str, Any], ids: Sequence[int], *, there: bool, again: bool, context: int, states: Any = None
    ) -> Any:
        asked.append(len(ids))
        return Attempt(body["max_tokens"], None, len(ids), -1 if again else without)

    async def main() -> list[int]:
        async def known() -> set[str]:
            return set()

        replay = Replay(ask, Task(max_tokens=8), [1, 2, 3], [], asyncio.Lock(), known)
        return [body["position"] async for body in replay.parts()]

    assert asyncio.run(main()) == list(range(3, 11))
    assert asked == [3, 3 + without]
