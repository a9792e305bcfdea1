"""Where a peer takes messages that do not come through the broker. Knows frames, not what they mean."""

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import zmq

from ...client.wire import BATCH, HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, LAST, LOOKS, READABLE, plain, received
from ...schema.errors import Malformed, Refused
from ...schema.limits import MAX_MESSAGE
from ...schema.message import Direct
from .address import here
from .memory import MARK, UNREAD, Views
from .near import SCHEME, Listener, Stream

HERE: Final = b"here"  # the first message on a connection within a host, from the one that was called


class Door:
    """A local socket, and a TCP port where others are to reach it from outside.

    The local one has a name without a file, which ends with the process, and lets in processes of this user alone.
    The port's key is drawn anew each time and told to the broker alone: who knows it was sent by the broker.

    Args:
        take: called with the frames (memoryviews) of each message, within the event loop.
        far: this machine's address as others see it; "" for no port.
        secure: the port takes CURVE connections alone.

    Raises:
        Refused: the address is not this machine's.
    """

    def __init__(
        self,
        take: Callable[[list[Any]], None],
        *,
        far: str = "",
        secure: bool = True,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._views = Views(self._let_go)
        self._context = context or zmq.Context.instance()
        self._closed = False
        self._listener: Listener | None = None
        self._streams: dict[bytes, Stream] = {}  # of this host, by a number of their own
        self._numbers = itertools.count(1)
        self._sockets: list[zmq.Socket[bytes]] = []
        self._pumps: dict[zmq.Socket[bytes], Callable[[], None]] = {}
        self._again: set[zmq.Socket[bytes]] = set()  # for which a pass is to come
        self._gaps: set[bytes] = set()  # of whom a message could not be read: nothing that follows it counts
        self.refused = 0  # messages that were none
        name, key, url = f"ralmq-{os.urandom(16).hex()}", "", ""
        try:
            with contextlib.suppress(OSError):  # without such sockets nobody is on this host
                self._listener = Listener(name, self._connected)
            if far:
                options: list[tuple[int, Any]] = [(zmq.IPV6, int(far.startswith("[")))]
                if secure:
                    public, secret = zmq.curve_keypair()
                    options += [(zmq.CURVE_SERVER, 1), (zmq.CURVE_SECRETKEY, secret)]
                    key = public.decode()
                url = self._bound(f"tcp://{far}:*", options)
        except zmq.ZMQError as error:
            self.close()
            raise Refused(f"cannot take messages at {far} ({error.strerror}): give -o address=IP of its own") from None
        self.direct = Direct(here(), key, SCHEME + name if self._listener is not None else "", url)

    def forget(self) -> None:
        """The memory of other processes is kept no longer than it is used: they send no more."""
        self._views.forget()

    def close(self) -> None:
        self._closed = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        for bound in self._sockets:
            self._loop.remove_reader(bound.fileno())
            bound.close(0)
        self._sockets.clear()

    def _bound(self, url: str, options: list[tuple[int, Any]]) -> str:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        try:
            for option, value in (*_OPTIONS, *options):
                socket.setsockopt(option, value)
            socket.bind(url)
        except zmq.ZMQError:
            socket.close(0)
            raise
        self._sockets.append(socket)
        receive, _, events = plain(socket)
        pump = partial(self._pump, socket, receive, events)
        self._pumps[socket] = pump
        self._loop.add_reader(socket.fileno(), pump)
        self._soon(socket)
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _soon(self, socket: "zmq.Socket[bytes]") -> None:
        if socket not in self._again:
            self._again.add(socket)
            self._loop.call_soon(self._pumps[socket])

    def _pump(self, socket: "zmq.Socket[bytes]", receive: Any, events: Callable[[], int]) -> None:
        """Takes what has arrived, at most a batch; the descriptor is edge-triggered, so the socket is asked again."""
        if self._closed:
            return
        self._again.discard(socket)
        more, looked = True, False
        try:
            for number in range(BATCH):
                if number < LOOKS and not events() & READABLE:
                    more, looked = False, True  # nothing touches the socket after this look
                    break
                sender = receive(LAST)
                self._arrived(sender, received(receive), near=False)
                if self._closed:
                    return
        except zmq.Again:
            more = False
        finally:  # also where one message cannot be served: those behind it have no edge
            if not self._closed and (more or (not looked and events() & READABLE)):
                self._soon(socket)

    def _connected(self, other: socket.socket) -> None:
        """Another process of this host has a lane to here, and is told that somebody is."""
        sender = b"near %d" % next(self._numbers)

        def ended() -> None:
            self._streams.pop(sender, None)
            self._gaps.discard(sender)

        stream = Stream(other, lambda frames: self._arrived(sender, frames, near=True), ended)
        self._streams[sender] = stream
        stream.send([HERE])

    def _arrived(self, sender: bytes, frames: list[Any], *, near: bool) -> None:
        if sender in self._gaps:
            self.refused += 1
            return
        if len(frames[0]) and frames[0][0] == MARK:
            try:
                if not near:  # from another host, or who else reaches the port
                    raise Malformed("memory of another host")
                frames = self._views.whole(sender, frames)
            except Malformed:
                self.refused += 1
                self._gaps.add(sender)
                if near:
                    self._answer(sender, UNREAD)
                return
        self._take(frames)

    def _let_go(self, sender: bytes, message: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._answer, sender, message)

    def _answer(self, sender: bytes, message: bytes) -> None:
        stream = self._streams.get(sender)
        if stream is not None:  # else gone, and its memory with it
            stream.send([message])


_OPTIONS = (
    (zmq.ROUTER_MANDATORY, 1),
    (zmq.LINGER, 0),
    (zmq.RCVHWM, 0),  # at a bound libzmq would stop reading, and abort when the other side ends then
    (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
    (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
    (zmq.MAXMSGSIZE, MAX_MESSAGE + (1 << 20)),
)
