"""One request under way, seen from the asker: its parts in order, each once, and its end."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from ..schema.errors import RalmqError, RequestCancelled, WorkerLost, error_of
from ..schema.frame import Prefix
from ..schema.message import Error, Final, Partial

WINDOW = 64  # parts that may be on their way to a reader


class Pending:
    """What the link knows of a request that has not ended.

    Attributes:
        frames: as sent, kept so that the request can be sent again after the broker came back.
        sent: how often it was sent; attempt = sent - 1.
        granted: parts that the other side was told it may send, counted from the first.
        paced: the credit grows as parts are taken; else by `allow` alone.
        deadline: loop time at which it must have ended.
    """

    def __init__(self, identity: bytes, frames: list[Any], deadline: float, window: int) -> None:
        self.id = identity
        self.frames = frames
        self.deadline = deadline
        self.window = window
        self.sent = 0
        self.ended = False
        self.timer: asyncio.TimerHandle | None = None
        self.grant: Callable[[int], None] | None = None
        self.paced = True
        self._parts: deque[Partial | Final | RalmqError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.granted = window
        self._received = 0  # parts seen, over all attempts
        self._place = 0  # of the next part within the attempt
        self._placed = 0  # the attempt that `_place` counts in
        self._taken = 0

    @property
    def attempt(self) -> int:
        return self.sent - 1

    def take(self, prefix: Prefix, message: Partial | Final | Error) -> None:
        """An answer came. Parts seen before (it was sent again, or another worker began anew) are passed over."""
        if prefix.attempt != self.attempt or self.ended:
            return
        if isinstance(message, Error):
            after = message.retry_after_ms / 1000
            self.end(
                error_of(message.code, message.message, request_id=self.id, retry_after=after, worker=message.worker)
            )
        elif isinstance(message, Final):
            self.end(message)
        else:
            # the sequence wraps at 2^16; a part numbered 0 out of turn is the first of another worker
            if self._placed != prefix.attempt or (prefix.sequence == 0 and self._place & 0xFFFF):
                self._placed, self._place = prefix.attempt, 0
            ahead = (prefix.sequence - self._place) & 0xFFFF
            if ahead > 0x7FFF:
                return  # it came twice
            if ahead:
                self.end(WorkerLost("its worker left a part of the answer out: ask again", request_id=self.id))
                return
            self._place += 1
            if self._place > self._received:
                self._received = self._place
                self._put(message)

    def end(self, outcome: Final | RalmqError) -> None:
        """The end, from the broker or from this side; the first one counts."""
        if not self.ended:
            self.ended = True
            if self.timer is not None:
                self.timer.cancel()
            self._put(outcome)

    async def next(self) -> Partial | Final:
        """The next part, or the end. One reader at a time.

        Raises:
            RalmqError: the request failed.
        """
        while not self._parts:
            if self.ended:
                raise RequestCancelled("its end was read before", request_id=self.id)
            if self._waiter is not None:
                raise RuntimeError("a stream has one reader at a time: another task awaits its next part")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        part = self._parts.popleft()
        if isinstance(part, RalmqError):
            raise part
        if isinstance(part, Partial) and self.window and self.paced:
            self._taken += 1
            if self._taken + self.window - self.granted >= max(1, self.window // 2):
                self.allow(self._taken + self.window)
        return part

    def allow(self, until: int) -> None:
        """The other side may send so many parts, counted from the first; it never shrinks."""
        if until > self.granted and not self.ended and self.grant is not None:
            self.granted = until
            self.grant(until)

    def _put(self, part: Partial | Final | RalmqError) -> None:
        self._parts.append(part)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
