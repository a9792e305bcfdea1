"""One DEALER in the event loop: frames out and in, in order, never blocking. Knows bytes, not messages."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import zmq

from ..schema.errors import Refused
from ..schema.limits import MAX_FRAMES, MAX_MESSAGE

BATCH: Final = 64  # messages a pass, so that timers and other tasks get their turn
RETRY: Final = 0.01  # seconds until a socket that took nothing is tried again
HEARTBEAT_MS: Final = 500
HEARTBEAT_TIMEOUT_MS: Final = 2000
LINGER_MS: Final = 500
RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 500


class Wire:
    """A connection that libzmq makes and remakes by itself.

    Args:
        url: tcp://host:port, ipc://path or inproc://name.
        take: called with the frames (memoryviews) of each message, within the event loop.
        context: shared with the broker for inproc; else the process has one.

    Raises:
        Refused: the url is no address.
    """

    def __init__(self, url: str, take: Callable[[list[Any]], None], context: zmq.Context[Any] | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._waiting: deque[list[Any]] = deque()
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None
        self._socket: zmq.Socket[bytes] = (context or zmq.Context.instance()).socket(zmq.DEALER)
        for option, value in _OPTIONS:
            self._socket.setsockopt(option, value)
        try:
            self._socket.connect(url)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise Refused(f"{url} is no broker address ({error.strerror}): give tcp://host:port") from None
        self._loop.add_reader(self._socket.fileno(), self._pump)
        self._pump_soon()

    def send(self, frames: list[Any]) -> None:
        """Sends, or keeps in order until the socket takes it."""
        if self._waiting or not self._put(frames):
            self._waiting.append(frames)
            if self._timer is None:
                self._timer = self._loop.call_later(RETRY, self._flush)
        self._pump_soon()  # the descriptor is edge-triggered: a send may have taken the edge of an arrival

    def forget(self) -> None:
        """Drops what is kept: it was meant for a broker that is no more."""
        self._waiting.clear()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close(LINGER_MS)

    def _put(self, frames: list[Any]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def _flush(self) -> None:
        self._timer = None
        while self._waiting and self._put(self._waiting[0]):
            self._waiting.popleft()
        if self._waiting:
            self._timer = self._loop.call_later(RETRY, self._flush)
        self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        receive = self._socket.recv
        if self._socket.closed:
            return
        try:
            for _ in range(BATCH):
                frame = receive(zmq.NOBLOCK, copy=False)
                frames = [frame.buffer]
                while frame.more:
                    frame = receive(zmq.NOBLOCK, copy=False)
                    if len(frames) <= MAX_FRAMES:  # one more than allowed shows that there were too many
                        frames.append(frame.buffer)
                self._take(frames)
                if self._socket.closed:
                    return
        except zmq.Again:
            if not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                return
        self._pump_soon()


_OPTIONS = (
    (zmq.LINGER, LINGER_MS),
    (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
    (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
    (zmq.RECONNECT_IVL, RECONNECT_MS),
    (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
    (zmq.MAXMSGSIZE, MAX_MESSAGE + (1 << 20)),
)
