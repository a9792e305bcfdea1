"""The straight connections between the members of a group, and what is known of each. Knows calls by their number.

A call of a group is one collective; each member counts them, so the number says which one a message belongs to. What
goes wrong once ends the group: its members would not be in the same call any more.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from ...schema.codec import decode, encode
from ...schema.errors import Malformed, RalmqError, Refused
from ...schema.message import Partial
from ..direct.door import Door
from ..direct.lane import Lane
from .arrays import Elements, elements_of
from .errors import RankLost, RankMissing, named
from .meeting import Table

GRACE: Final = 0.3  # seconds in which what a member sent before its end may still arrive
ANSWER: Final = 1.0  # seconds that a member has to say where it is
LEAVING: Final = 5.0  # seconds that the others have to say that they have all of what this member sent
PAST: Final = 64  # calls that are remembered, to say what was called
PIECE: Final = 64 << 20  # bytes of one message
FAULTS: Final[dict[str, type[RankLost] | type[RankMissing]]] = {"lost": RankLost, "missing": RankMissing}
Key = tuple[int, int, int]  # call, step of the call, rank


class Sender(Lane):
    """A lane that has copied all of a message when `send` returns, so that arrays may change from then on."""

    def send(self, frames: list[Any]) -> None:
        """What goes through shared memory is copied there in any case."""
        head, *rest = frames if self._slots is None else self._slots.placed(frames)
        self.put([head, *map(bytes, rest)])


class Mesh:
    """One member's connections to all others.

    Attributes:
        rank, size: its own, and how many there are.
        calls: calls that this member has begun.
        fault: what ended the group; None while all is well.
        refused: messages that were none.
    """

    def __init__(self, far: str = "", secure: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self._door = Door(self._arrived, far=far, secure=secure)
        self.direct = self._door.direct
        self.rank, self.size = 0, 1
        self.calls = 0
        self.fault: RalmqError | None = None
        self.refused = 0
        self._token = b""
        self._early: list[list[bytes]] = []
        self._lanes: dict[int, Sender] = {}
        self._came: dict[Key, deque[tuple[int, Elements]]] = {}
        self._waiting: dict[Key, asyncio.Future[None]] = {}
        self._open: dict[int, list[Any]] = {}  # calls under way, and what each is
        self._past: dict[int, list[Any]] = {}  # the last ones that are over
        self._said: dict[int, dict[int, list[Any]]] = {}  # what others say of calls that this one has not begun
        self._left: dict[int, int] = {}  # members that have left, after so many calls
        self._cut: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._places: dict[int, int] = {}  # calls begun by others, as asked for
        self._settled: set[int] = set()  # members that have all of what this one sent
        self._changed = asyncio.Event()  # of what is known of the others

    def join(self, table: Table) -> None:
        """Connects to all others.

        Raises:
            Refused: nothing leads to one of them.
        """
        self.rank, self.size, self._token = table.rank, len(table.members), table.token
        for rank in self.others:
            try:
                self._lanes[rank] = Sender(table.members[rank][0], lambda reason, rank=rank: self._ended(rank))  # type: ignore[misc]
            except Refused as error:
                raise Refused(f"rank {rank} cannot be reached: {error.message}: give group() an address=") from None
        for frames in self._early:
            self._arrived(frames)
        self._early.clear()

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    # -- calls

    def begin(self, what: list[Any]) -> int:
        """The number of a new call; all members must make the same ones, in the same order.

        Raises:
            RalmqError: the group has ended, or another member has left or makes another call.
        """
        number = self.calls
        self.calls += 1
        self._open[number] = what
        for rank, said in self._said.pop(number, {}).items():
            self._compare(rank, said, what)
        gone = [rank for rank, calls in self._left.items() if calls <= number]
        if gone and self.fault is None:
            self.fail(_left(gone))
        if self.fault is not None:
            self.end(number)
            raise self.fault
        return number

    def end(self, number: int) -> None:
        """A call is over."""
        self._past[number] = self._open.pop(number)
        self._past.pop(number - PAST, None)
        for key in [key for key in self._came if key[0] == number]:
            del self._came[key]

    def send(self, number: int, step: int, rank: int, elements: Elements | None = None) -> None:
        """Something of a call to another member."""
        body = {"call": number, "step": step, "what": self._open[number]}
        if elements is None:
            self._tell(rank, body)
            return
        size = max(1, PIECE // elements.flat.itemsize)
        starts = range(0, max(1, len(elements.flat)), size)
        body |= {"of": len(starts), "shape": list(elements.shape), "torch": elements.torch}
        for start in starts:
            piece = elements.cut(start, min(start + size, len(elements.flat)))
            self._tell(rank, body, [piece.tensor()])

    async def take(self, number: int, step: int, rank: int) -> Elements:
        """What another member sent with the same number and step; its elements must not be written to."""
        key = number, step, rank
        pieces: list[Elements] = []
        while True:
            came = self._came.get(key)
            while came:
                of, piece = came.popleft()
                pieces.append(piece)
                if len(pieces) == of:
                    whole = piece.flat if of == 1 else np.concatenate([each.flat for each in pieces])
                    return Elements(piece.dtype, piece.shape, whole, piece.torch)
            await self._wait(key)

    async def missing(self, number: int) -> list[int]:
        """Asks the others where they are: those that have not begun a call, or do not answer."""
        self._places.clear()
        for rank in self.others:
            self._tell(rank, {"where": True})
        try:
            async with asyncio.timeout(ANSWER):
                while len(self._places) < len(self.others) and self.fault is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return [rank for rank in self.others if self._places.get(rank, -1) <= number]

    # -- the end

    async def over(self) -> None:
        """Returns when something has ended the group."""
        while self.fault is None:
            self._changed.clear()
            await self._changed.wait()

    def fail(self, error: RalmqError, tell: bool = True) -> None:
        """Ends the group, and all calls under way with this error; the first one counts."""
        if self.fault is not None:
            return
        self.fault = error
        self._changed.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        if tell:
            kind = next((kind for kind, made in FAULTS.items() if isinstance(error, made)), "refused")
            ranks = list(getattr(error, "ranks", ()))
            for rank in self.others:
                self._tell(rank, {"fault": kind, "ranks": ranks, "why": error.message})

    async def leave(self) -> None:
        """Says goodbye, waits until the others have all that was sent to them, and closes."""
        try:
            if self.fault is None and self._lanes:
                for rank in self.others:
                    self._tell(rank, {"left": self.calls})
                async with asyncio.timeout(LEAVING):
                    while set(self.others) - self._cut - self._settled:
                        self._changed.clear()
                        await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """At once; the others take this member for lost, unless it has left."""
        if self._timer is not None:
            self._timer.cancel()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._door.close()
        self._came.clear()

    # -- inside

    def _tell(self, rank: int, body: dict[str, Any], tensors: Iterable[Any] = ()) -> None:
        if rank in self._lanes:
            self._lanes[rank].send(encode(Partial(body, list(tensors)), id=self._token, attempt=self.rank))

    async def _wait(self, key: Key) -> None:
        if self.fault is not None:
            raise self.fault
        self._waiting[key] = self._loop.create_future()
        try:
            await self._waiting[key]
        finally:
            del self._waiting[key]

    def _arrived(self, frames: list[Any]) -> None:
        if not self._token:
            self._early.append([bytes(frame) for frame in frames])
            return
        try:
            prefix, message = decode(frames)
            if not isinstance(message, Partial) or prefix.id != self._token or prefix.attempt not in self._lanes:
                raise Malformed("not of this group")
            self._heard(prefix.attempt, message)
        except (Malformed, KeyError, TypeError, ValueError):
            self.refused += 1

    def _heard(self, rank: int, message: Partial) -> None:
        body = message.body
        if "call" in body:
            self._part(rank, message)
        elif "where" in body:
            self._tell(rank, {"at": self.calls})
        elif "at" in body:
            self._places[rank] = int(body["at"])
            self._changed.set()
        elif "left" in body:
            self._left[rank] = int(body["left"])
            self._tell(rank, {"received": True})
            if any(number >= self._left[rank] for number in self._open):
                self.fail(_left([rank]))
        elif "received" in body:
            self._settled.add(rank)
            self._changed.set()
        else:
            made = FAULTS.get(body["fault"])
            ranks = [int(each) for each in body["ranks"]]
            self.fail(made(str(body["why"]), ranks) if made else Refused(str(body["why"])), tell=False)

    def _part(self, rank: int, message: Partial) -> None:
        body = message.body
        number, key = int(body["call"]), (int(body["call"]), int(body["step"]), rank)
        if number in self._open:
            self._compare(rank, body["what"], self._open[number])
        elif number < self.calls:  # whatever belongs to that call has come
            self._compare(rank, body["what"], self._past.get(number, ["another one"]))
            return
        else:
            self._said.setdefault(number, {})[rank] = body["what"]
        piece = Elements("u8", (0,), np.empty(0, np.uint8))
        if message.tensors:
            piece = elements_of(message.tensors[0])
            piece.shape, piece.torch = tuple(map(int, body["shape"])), bool(body["torch"])
        self._came.setdefault(key, deque()).append((int(body.get("of", 1)), piece))
        future = self._waiting.get(key)
        if future is not None and not future.done():
            future.set_result(None)

    def _compare(self, rank: int, said: Any, own: list[Any]) -> None:
        if said != own:
            self.fail(
                Refused(
                    f"rank {rank} calls {_call(said)} where rank {self.rank} calls {_call(own)}: all members must "
                    "make the same calls in the same order, with the same shapes where they reduce"
                )
            )

    def _ended(self, rank: int) -> None:
        """The connection to a member is gone; what it had sent before may still be on its way."""
        self._cut.add(rank)
        self._changed.set()
        if rank not in self._left and self._timer is None:
            self._timer = self._loop.call_later(GRACE, self._lost)

    def _lost(self) -> None:
        self._timer = None
        ranks = sorted(self._cut - self._left.keys())
        if ranks:
            text = "its connection has" if len(ranks) == 1 else "their connections have"
            self.fail(RankLost(f"{named(ranks)} of {self.size} died: {text} ended; open the group anew", ranks))


def _left(ranks: list[int]) -> RankLost:
    text = "has" if len(ranks) == 1 else "have"
    return RankLost(f"{named(ranks)} {text} left the group: there is nobody to take part in this call", ranks)


def _call(what: Any) -> str:
    name, *details = what if isinstance(what, list) and what else ["?"]
    return f"{name}({', '.join(map(str, details))})"
