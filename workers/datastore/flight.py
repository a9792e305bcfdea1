"""A list of questions, a few of them asked at a time. Knows no question."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


async def several_at_once(count: int, todo: Iterable[T], ask: Callable[[T], Awaitable[None]]) -> None:
    """Awaits `ask` of each, `count` at a time, in their order; the first error ends the others and is raised itself."""
    waiting: Iterator[T] = iter(todo)

    async def work() -> None:
        for one in waiting:
            await ask(one)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
