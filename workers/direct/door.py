"""Where a peer takes messages that do not come through the broker. Knows frames, not what they mean."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq

from ...client.wire import BATCH, HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, LAST, LOOKS, READABLE, plain, received
from ...schema.errors import Malformed, Refused
from ...schema.limits import MAX_MESSAGE
from ...schema.message import Direct
from .address import here
from .memory import MARK, UNREAD, Views


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
        self._sockets: list[zmq.Socket[bytes]] = []
        self._pumps: dict[zmq.Socket[bytes], Callable[[], None]] = {}
        self._again: set[zmq.Socket[bytes]] = set()  # for which a pass is to come
        self._gaps: set[bytes] = set()  # of whom a message could not be read: nothing that follows it counts
        self.refused = 0  # messages that were none
        near, key, url = f"ipc://@ralmq-{os.urandom(16).hex()}", "", ""
        try:
            self._bound(near, [(zmq.IPC_FILTER_UID, os.getuid())])
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
        self.direct = Direct(here(), key, near, url)

    def forget(self) -> None:
        """The memory of other processes is kept no longer than it is used: they send no more."""
        self._views.forget()

    def close(self) -> None:
        self._closed = True
        for socket in self._sockets:
            self._loop.remove_reader(socket.fileno())
            socket.close(0)
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
                self._arrived(socket, sender, received(receive))
                if self._closed:
                    return
        except zmq.Again:
            more = False
        finally:  # also where one message cannot be served: those behind it have no edge
            if not self._closed and (more or (not looked and events() & READABLE)):
                self._soon(socket)

    def _arrived(self, socket: "zmq.Socket[bytes]", sender: bytes, frames: list[Any]) -> None:
        if sender in self._gaps:
            self.refused += 1
            return
        if len(frames[0]) and frames[0][0] == MARK:
            near = socket is self._sockets[0]  # else from another host, or who else reaches the port
            try:
                if not near:
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
        if self._closed:
            return
        try:
            self._sockets[0].send_multipart([sender, message], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):  # else gone, and its memory with it
                raise
        for socket in self._sockets:  # sending may have taken the edge
            self._soon(socket)


_OPTIONS = (
    (zmq.ROUTER_MANDATORY, 1),
    (zmq.LINGER, 0),
    (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
    (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
    (zmq.MAXMSGSIZE, MAX_MESSAGE + (1 << 20)),
)
