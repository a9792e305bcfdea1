"""Several streams as one, items in the order in which they come. Knows no message."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all sources, each with the place of its source, which waits while its last item is not taken.

    The first error of any ends all, as closing this does; all sources are closed by then.
    """
    queue: asyncio.Queue[tuple[int, T | None, Exception | None]] = asyncio.Queue(1)

    async def pump(place: int, source: AsyncGenerator[T, None]) -> None:
        error: Exception | None = None
        try:
            async with aclosing(source):
                async for item in source:
                    await queue.put((place, item, None))
        except Exception as raised:
            error = raised
        await queue.put((place, None, error))

    tasks = [asyncio.create_task(pump(place, source)) for place, source in enumerate(sources)]
    try:
        going = len(tasks)
        while going:
            place, item, error = await queue.get()
            if error is not None:
                raise error
            if item is None:
                going -= 1
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
