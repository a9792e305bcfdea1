"""An answer in parts, as its reader sees it, and when to ask again after Busy. Knows the link, no service."""

import asyncio
import random
from collections.abc import Callable
from typing import Self

from ..schema.errors import Busy
from ..schema.message import Final, Partial
from .link import Link
from .pending import Pending
from .results import Reply


class Stream:
    """Parts of an answer as they come; iterate with `async for`. Leaving early, or `aclose`, cancels the request.

    Attributes:
        final: the body and tensors that ended it, once it has ended.
    """

    def __init__(
        self, link: Link, ask: Callable[[], Pending], retries: int, end: float, credit: Callable[[], int] | None = None
    ) -> None:
        self._link = link
        self._ask = ask
        self._retries = retries
        self._end = end
        self._credit = credit
        self._begun = False
        self._pending = ask()
        self.final: Reply | None = None

    @property
    def id(self) -> bytes:
        return self._pending.id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Reply:
        if self.final is not None:
            raise StopAsyncIteration
        try:
            part = await self._next()
        except BaseException:
            await self.aclose()
            raise
        reply = Reply(part.body, tuple(part.tensors))
        if isinstance(part, Partial):
            return reply
        self.final = reply
        raise StopAsyncIteration

    async def _next(self) -> Partial | Final:
        while True:
            try:
                part = await self._pending.next()
                self._begun = True
                return part
            except Busy as busy:
                if self._begun or not self._retries:  # a worker that is busy amid an answer is not asked again
                    raise
                self._retries -= 1
                await pause(busy, self._end)
                self._pending = self._ask()

    def granted(self) -> None:
        """What `credit` gives has grown."""
        if self._credit is not None:
            self._pending.allow(self._credit())

    async def aclose(self) -> None:
        """Gives the request up where it has not ended."""
        self._link.cancel(self._pending)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        pending = getattr(self, "_pending", None)
        if pending is not None and not pending.ended:  # an `async for` that was left by break: nobody can read on
            self._link.cancel(pending)


async def pause(busy: Busy, end: float) -> None:
    """Waits until a resend is expected to find room; a little more, so that those who wait do not come at once.

    Raises:
        Busy: that would be after the end of the call.
    """
    seconds = busy.retry_after * random.uniform(1.0, 1.1)
    if asyncio.get_running_loop().time() + seconds >= end:
        raise busy
    await asyncio.sleep(seconds)
