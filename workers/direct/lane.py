"""The way to one other peer's door. Knows frames, not what they mean."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import zmq

from ...client.wire import Wire
from ...schema.errors import Refused
from ...schema.keys import PeerKey
from ...schema.message import Direct
from .address import here
from .memory import UNREAD, Slots
from .near import SCHEME, Stream, connected

_APART: Final[set[str]] = set()  # doors of this host whose processes cannot read memory of this one


class Lane:
    """A connection to a door: through a local socket and shared memory on one host, else TCP. Frames keep their order.

    Args:
        door: what the other peer announced.
        cut: called with the reason when the connection has ended: what was on its way is lost, and the lane with it.
            Before `met` it could not be made, and nothing was on its way.
        met: called when the other side is there.

    Raises:
        Refused: nothing leads from here to that door.
    """

    def __init__(
        self,
        door: Direct,
        cut: Callable[[str], None],
        met: Callable[[], None] = lambda: None,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self.near = bool(door.near) and door.host == here()
        self.url = door.near if self.near else door.far
        if not self.url:
            raise Refused("the other side is on another host and has no address there")
        self._slots = Slots() if self.near and self.url not in _APART else None
        self._cut = cut
        self._met = met
        self._heard_of = self._closed = False
        self._way: Wire | Stream | None = None
        if self.near:
            try:
                self._way = Stream(connected(self.url.removeprefix(SCHEME)), self._heard, self._ended)
            except OSError:  # nobody is there; said later, since who makes this lane does not have it yet
                asyncio.get_running_loop().call_soon(self._ended)
            return
        key = None
        if door.key:
            public, secret = zmq.curve_keypair()
            key = PeerKey(public.decode(), secret.decode(), door.key)
        self._way = Wire(self.url, self._heard, self._ended, context, key, self._refused, met=met, once=True)

    def send(self, frames: list[Any]) -> None:
        """Sends, or keeps in order until the socket takes it; large frames must not change before they are read."""
        self.put(frames if self._slots is None else self._slots.placed(frames))

    def put(self, frames: list[Any]) -> None:
        """The same for a message as it travels."""
        if self._way is not None:
            self._way.send(frames)

    def close(self) -> None:
        """What has not left yet is dropped."""
        self._closed = True
        if isinstance(self._way, Wire):
            self._way.forget()
        if self._way is not None:
            self._way.close()
        if self._slots is not None:
            self._slots.close()

    def _heard(self, frames: list[Any]) -> None:
        if self.near and not self._heard_of:  # what the door says first
            self._heard_of = True
            self._met()
        elif bytes(frames[0]) == UNREAD:
            _APART.add(self.url)
            self._cut(f"a message is lost: {self.url} cannot read this process' memory, and gets none from now on")
        elif self._slots is not None:
            self._slots.freed(frames[0])

    def _refused(self, reason: str, certain: bool) -> None:
        self._cut(reason)

    def _ended(self) -> None:
        if not self._closed:
            self._cut(f"its connection to {self.url} has ended")
