"""Requests and answers between processes of one host, without the broker: a door here, a lane to each other's door.

Knows messages and whom they answer, not what they ask. What goes to one door in one turn of the loop goes in one
message; large tensors go through shared memory, see workers/direct.
"""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from ..schema.codec import decode, encode
from ..schema.errors import Malformed, RalmqError, Refused, WorkerFailed, WorkerLost, error_of
from ..schema.message import Direct, Error, Request
from ..schema.message import Final as End
from ..schema.tensor import Tensor, tensor_of
from ..workers.direct.address import here
from ..workers.direct.door import Door
from ..workers.direct.lane import Lane

log = logging.getLogger("ralmq.remote")
DOORS: Final = "ipc://@ralmq-"  # how the address of a door begins: a peer cannot have this process connect elsewhere
SERVICE: Final = "straight"
ENDED: Final = "has ended, or does not answer"
ASKED, ANSWERED, FAILED = range(3)
MEET: Final = 5.0  # seconds in which a door answers, unless its process is stopped
MOST_ITEMS: Final = 32  # of one message
MOST_TENSORS: Final = 48
MOST_BYTES: Final = 128 << 10  # of tensors, where there is more than one item
Done = Callable[[End | RalmqError], None]
Serve = Callable[[dict[str, Any], Sequence[Any], Callable[[End | Error], None]], None]


class Unsent(RalmqError):
    """A request that did not leave, since it does not fit into a message."""


@dataclass(slots=True)
class Item:
    """A request or an answer on its way."""

    kind: int
    number: int
    body: dict[str, Any]
    tensors: list[Tensor]

    @property
    def size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Straight:
    """One process's door, and its lanes to others. In the event loop, but for what `together` covers.

    Args:
        serve: called with body, tensors and what to call with the answer, for each request that comes.
        lost: called with the address of a door whose process has ended.
    """

    def __init__(self, serve: Serve | None = None, lost: Callable[[str], None] = lambda near: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._serve = serve
        self._lost = lost
        self._door = Door(self._arrived)
        self._lanes: dict[str, Lane] = {}
        self._unmet: dict[str, asyncio.TimerHandle] = {}  # lanes whose doors have not answered yet
        self._waiting: dict[str, list[Item]] = {}  # what leaves at the end of this turn
        self._asked: dict[int, tuple[str, Done]] = {}
        self._turn = threading.RLock()
        self._holding = False
        self._numbers = itertools.count(1)
        self.near = self._door.direct.near
        self.host = self._door.direct.host

    def ask(self, near: str, body: dict[str, Any], tensors: Sequence[Any], done: Done) -> None:
        """Sends a request to the door at `near`; `done` gets its end, which is Unsent where it does not fit.

        Raises:
            Refused: no door's address.
        """
        item = Item(ASKED, next(self._numbers), body, list(map(tensor_of, tensors)))
        self._lane(near)
        self._asked[item.number] = (near, done)
        self._put(near, item)

    def open(self, near: str) -> bool:
        """Whether there is a lane to that door: within `together`, `ask` may then be called in any thread."""
        return near in self._lanes and near not in self._unmet

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes to one door within leaves in one message at the end, without another turn of the loop; one thread
        at a time is here."""
        with self._turn:
            self._holding = True
            try:
                yield
            finally:
                self._holding = False
                for near in list(self._waiting):
                    self._flush(near)

    def forget(self, near: str, error: RalmqError) -> None:
        """Ends what that door was asked, and the lane to it."""
        with self._turn:
            lane = self._lanes.pop(near, None)
            self._waiting.pop(near, None)
            asked = [self._asked.pop(number)[1] for number, (where, _) in list(self._asked.items()) if where == near]
        self._met(near)
        if lane is not None:
            self._loop.call_soon(lane.close)  # it may be the one that is calling
        for done in asked:
            done(error)

    def close(self) -> None:
        with self._turn:
            for near in list(self._lanes):
                self._lanes.pop(near).close()
                self._met(near)
            self._waiting.clear()
            self._asked.clear()
        self._door.close()

    # -- inside

    def _lane(self, near: str) -> Lane:
        if near not in self._lanes:
            if not near.startswith(DOORS):
                raise Refused("that is no door of a process of this host")
            lane = Lane(Direct(here(), "", near, ""), lambda reason: self._cut(near, lane), lambda: self._met(near))
            self._lanes[near] = lane
            self._unmet[near] = self._loop.call_later(MEET, self._cut, near, lane)
        return self._lanes[near]

    def _met(self, near: str) -> None:
        timer = self._unmet.pop(near, None)
        if timer is not None:
            timer.cancel()

    def _cut(self, near: str, lane: Lane) -> None:
        if self._lanes.get(near) is lane:
            self._lost(near)
            self.forget(near, WorkerLost(f"the other process {ENDED}, and what it held is lost"))

    def _put(self, near: str, item: Item) -> None:
        if near not in self._waiting:
            self._waiting[near] = []
            if not self._holding:
                self._loop.call_soon(self._flush, near)
        self._waiting[near].append(item)

    def _flush(self, near: str) -> None:
        items = self._waiting.pop(near, [])
        begin = 0
        while begin < len(items):
            end, tensors, size = begin + 1, len(items[begin].tensors), items[begin].size
            while end < len(items) and end - begin < MOST_ITEMS:
                tensors, size = tensors + len(items[end].tensors), size + items[end].size
                if tensors > MOST_TENSORS or size > MOST_BYTES:
                    break
                end += 1
            self._send(near, items[begin:end])
            begin = end

    def _send(self, near: str, items: list[Item]) -> None:
        listed = [[item.kind, item.number, item.body, len(item.tensors)] for item in items]
        tensors = [tensor for item in items for tensor in item.tensors]
        try:
            frames = encode(Request(SERVICE, body={"from": self.near, "items": listed}, tensors=tensors))
        except Malformed as error:
            if len(items) > 1:
                for item in items:
                    self._send(near, [item])
            else:
                self._unsent(near, items[0], error)
            return
        self._lane(near).send(frames)

    def _unsent(self, near: str, item: Item, error: Malformed) -> None:
        if item.kind == ASKED:
            done = self._asked.pop(item.number, ("", _nothing))[1]
            self._loop.call_soon_threadsafe(done, Unsent(error.message))
        else:
            text = f"the answer cannot travel: {error.message}"
            self._send(near, [Item(FAILED, item.number, {"code": WorkerFailed.code, "text": text[:1000]}, [])])

    def _arrived(self, frames: list[Any]) -> None:
        try:
            _, message = decode(frames)
            near, items = message.body["from"], message.body["items"]
            if not near.startswith(DOORS):
                raise Malformed("it came from no door")
            first = 0
            with self.together():
                for kind, number, body, count in items:
                    tensors = message.tensors[first : first + count]
                    first += count
                    self._took(near, kind, number, body, tensors)
        except (Malformed, AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("what came straight is no message: %s", error)

    def _took(self, near: str, kind: int, number: int, body: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        if kind == ASKED:
            if self._serve is not None:
                self._serve(body, tensors, lambda answer: self._answer(near, number, answer))
            return
        where, done = self._asked.get(number, ("", _nothing))
        if where == near:
            del self._asked[number]
            done(End(body, tensors) if kind == ANSWERED else error_of(str(body.get("code")), str(body.get("text"))))

    def _answer(self, near: str, number: int, answer: End | Error) -> None:
        if isinstance(answer, End):
            try:
                self._put(near, Item(ANSWERED, number, answer.body, list(map(tensor_of, answer.tensors))))
                return
            except Malformed as error:
                answer = Error(WorkerFailed.code, f"the answer cannot travel: {error.message}")
        self._put(near, Item(FAILED, number, {"code": answer.code, "text": answer.message}, []))


def _nothing(_: Any) -> None:
    """Nobody waits for it."""
