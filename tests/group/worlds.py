"""Groups whose members live in one process, as tasks, over a broker of their own. Knows no test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from inprocess import Cluster, cluster
from ralmq.workers.group.group import Group, group

Member = Callable[[Group], Awaitable[Any]]


async def member(url: str, size: int, act: Member, rank: int | None = None, **options: Any) -> Any:
    """What one member's `act` returns."""
    async with group("g", size, rank, broker=url, **{"wait": 20.0, "timeout": 20.0, **options}) as own:
        return await act(own)


async def world(url: str, size: int, act: Member, **options: Any) -> list[Any]:
    """What `act` returns at each rank; `act` gets the group."""

    async def ranked(own: Group) -> tuple[int, Any]:
        return own.rank, await act(own)

    found = await asyncio.gather(*[member(url, size, ranked, **options) for _ in range(size)])
    assert sorted(rank for rank, _ in found) == list(range(size))
    return [made for _, made in sorted(found, key=lambda entry: entry[0])]


@asynccontextmanager
async def opened(url: str, size: int, **options: Any) -> AsyncIterator[list[Group]]:
    """The members by rank, left one after the other where the test has not ended them."""
    made = [group("g", size, rank, broker=url, **{"wait": 20.0, "timeout": 20.0, **options}) for rank in range(size)]
    groups = await asyncio.gather(*[each.__aenter__() for each in made])
    try:
        yield list(groups)
    finally:
        await asyncio.gather(*[each.__aexit__(None, None, None) for each in made])


__all__ = ["Cluster", "cluster", "member", "opened", "world"]
