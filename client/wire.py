"""One DEALER in the event loop: frames out and in, in order, never blocking. Knows bytes, not messages.

The descriptor is edge-triggered: each call may take the edge of an arrival, so after each the socket is asked again.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from ..schema.errors import Refused
from ..schema.keys import PeerKey
from ..schema.limits import MAX_FRAMES, MAX_MESSAGE
from .names import Names

LAST: Final = int(zmq.NOBLOCK)  # as plain numbers: `|` of two flags costs more than the send itself
MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
READABLE: Final = int(zmq.POLLIN)
WRITABLE: Final = int(zmq.POLLIN | zmq.POLLOUT)
EVENTS: Final = int(zmq.EVENTS)
LOOKS: Final = 2  # messages of a pass that are looked for first: finding none by an exception costs four times that
BATCH: Final = 64  # messages a pass, so that timers and other tasks get their turn
BROKEN: Final = 3  # handshakes that break off one after another, before that means something
MET: Final = -(1 << 62)  # failures of one that was heard: what breaks off is a broker that ends, or begins
RETRY: Final = 0.1  # seconds
AGAIN: Final = 1.0  # seconds after a refused key
WATCHED: Final = int(
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
HEARTBEAT_MS: Final = 500
HEARTBEAT_TIMEOUT_MS: Final = 2000
LINGER_MS: Final = 50  # of a broker that ends meanwhile a heartbeat could make libzmq abort the process
RECONNECT_MS: Final = 50
RECONNECT_MAX_MS: Final = 500
CONNECT_MS: Final = 2000  # else TCP itself tries again ever more rarely where packets are dropped


def plain(socket: "zmq.Socket[bytes]") -> tuple[Any, Any, Callable[[], int]]:
    """recv, send and the events of a socket at the C level: the wrappers around them cost as much as they do."""
    found: Any = super(zmq.Socket, cast(Any, socket))
    return found.recv, found.send, partial(found.get, EVENTS)


def received(receive: Any) -> list[Any]:
    """The frames of one message, at most one more than allowed, which shows that there were too many.

    Raises:
        zmq.Again: there is none.
    """
    frame = receive(LAST, False)
    frames = [frame.buffer]
    while frame.more:
        frame = receive(LAST, False)
        if len(frames) <= MAX_FRAMES:
            frames.append(frame.buffer)
    return frames


class Wire:
    """A connection that libzmq makes and remakes by itself.

    Args:
        url: tcp://host:port, ipc://path or inproc://name.
        take: called with the frames (memoryviews) of each message, within the event loop.
        cut: called when the connection has ended; what was on its way is lost. inproc does not tell.
        context: shared with the broker for inproc; else the process has one.
        key: what this side proves itself with, and the broker's public key; None where none is asked for.
        refused: called with the reason when the broker, or this side, does not accept the other's key, and whether that
            is certain: handshakes that only break off may be those of a broker behind a proxy that is not up yet.
        nameless: called with the reason when the host name has no address, and with "" when it has one again.
        met: called each time that a connection is made: before the first nothing can be on its way.
        once: one connection, and no other after it, so that nothing can arrive behind a gap; where it cannot be made,
            `cut` is called, too.

    Raises:
        Refused: the url is no address.
    """

    def __init__(
        self,
        url: str,
        take: Callable[[list[Any]], None],
        cut: Callable[[], None],
        context: zmq.Context[Any] | None,
        key: PeerKey | None = None,
        refused: Callable[[str, bool], None] = lambda reason, certain: None,
        nameless: Callable[[str], None] = lambda reason: None,
        met: Callable[[], None] = lambda: None,
        once: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._cut = cut
        self._refused = refused
        self._met = met
        self._once = once
        self._failures = 0
        self._why = _REASONS if key is not None else _NO_KEY
        self._waiting: deque[list[Any]] = deque()
        self._full = False  # the socket has refused the first of them
        self._pumping = False
        self._retry: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None  # of a connection that is tried again
        self._socket: zmq.Socket[bytes] = (context or zmq.Context.instance()).socket(zmq.DEALER)
        for option, value in _OPTIONS:
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.IPV6, int("[" in url))
        if not url.startswith("inproc"):  # at a bound it would stop reading, and abort when the broker ends then
            self._socket.setsockopt(zmq.RCVHWM, 0)  # what comes was asked for, and streams have credit
        if once:
            self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if key is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, key.broker.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret.encode())
        self._recv, self._send, self._events = plain(self._socket)
        watched = WATCHED | (zmq.EVENT_CLOSED if once else 0)  # nobody listens there
        self._monitor = self._socket.get_monitor_socket(watched)  # before the first connection, which may fail at once
        self._names = Names(url, self._moved, nameless)
        self._address = ""  # what libzmq is told
        if not self._names.needed:
            try:
                self._moved(url)
            except zmq.ZMQError as error:
                self._socket.disable_monitor()
                self._monitor.close(0)
                self._socket.close(0)
                raise Refused(f"{url} is no broker address ({error.strerror}): give tcp://host:port") from None
        self._names.start()
        self._loop.add_reader(self._socket.fileno(), self._pump)
        self._loop.add_reader(self._monitor.fileno(), self._disconnected)
        # takes the edge of the monitor's own connection, or the first real one would not show; later, since who makes
        # this one does not have it yet
        self._loop.call_soon(self._disconnected)
        self._pump_soon()

    @property
    def blocked(self) -> bool:
        """Whether there is no connection, or the other side takes nothing."""
        return self._full

    def send(self, frames: list[Any]) -> None:
        """Sends, or keeps in order until the socket takes it.

        What follows within one turn of the loop leaves together at its end: each message by itself would wake libzmq's
        own thread anew, which costs several times what the sending does.
        """
        if self._pumping or self._waiting:
            self._waiting.append(frames)
        elif not self._put(frames):
            self._full = True
            self._waiting.append(frames)
        self._pump_soon()

    def forget(self) -> None:
        """Drops what is kept: it was meant for a broker that is no more."""
        self._waiting.clear()
        self._full = False

    def close(self) -> None:
        self._flush()
        for timer in (self._retry, self._timer):
            if timer is not None:
                timer.cancel()
        self._names.stop()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(LINGER_MS)

    def _put(self, frames: list[Any]) -> bool:
        """Whether the socket took it. Where a connection ends in mid-message, libzmq takes back what it had of it."""
        send = self._send
        try:
            for frame in frames[:-1]:
                send(frame, MORE, False)
            send(frames[-1], LAST, False)
        except zmq.Again:
            return False
        return True

    def _flush(self) -> None:
        while self._waiting and self._put(self._waiting[0]):
            self._waiting.popleft()
        self._full = bool(self._waiting)

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Takes what has arrived, at most a batch, and sends what waits as far as the socket takes it."""
        self._pumping = False
        if self._socket.closed:
            return
        receive = self._recv
        more = True
        try:
            for number in range(BATCH):
                if number < LOOKS and not self._events() & READABLE:
                    if not self._waiting:
                        return  # this was the last look: nothing has touched the socket since
                    more = False
                    break
                frames = received(receive)
                self._failures = MET
                self._take(frames)
                if self._socket.closed:
                    return
        except zmq.Again:
            more = False
        except BaseException:  # one message that cannot be served must not leave those behind it without an edge
            self._pump_soon()
            raise
        self._flush()
        if more or self._events() & (WRITABLE if self._waiting else READABLE):
            self._pump_soon()
        elif self._waiting and self._retry is None:
            self._retry = self._loop.call_later(RETRY, self._again)

    def _again(self) -> None:
        """Nothing that waits depends on an edge of the descriptor alone."""
        self._retry = None
        self._pump()

    def _disconnected(self) -> None:
        cut, failure = False, 0
        if self._socket.closed:
            return
        try:
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._names.stop()
                    self._failures = min(0, self._failures)
                    self._met()
                    continue
                self._names.start()
                cut = cut or event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED)
                if event["event"] in self._why and event["value"] in _MEANT.get(
                    int(event["event"]), (int(event["value"]),)
                ):
                    failure = event["event"]
        except zmq.Again:
            pass
        if cut or (self._once and failure == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
            self._cut()
        if failure:
            self._failures += 1
            if failure == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                if self._failures < BROKEN:  # the broker may have ended just then
                    return
            else:  # libzmq itself gives up
                self._timer = self._loop.call_later(AGAIN, self._connect_again)
            self._refused(self._why[failure], failure != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)

    def _connect_again(self) -> None:
        if not self._socket.closed:
            self._socket.connect(self._address)

    def _moved(self, address: str) -> None:
        """The broker is to be found at another address than before."""
        if self._timer is not None:
            self._timer.cancel()
        if self._address:
            with contextlib.suppress(zmq.ZMQError):  # libzmq may have given it up
                self._socket.disconnect(self._address)
        self._socket.connect(address)
        self._address = address


_REASONS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "does not let this key in: it is not in its list, or was revoked",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "takes no keys: leave --keys and $RALMQ_KEYS away",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: (  # also where it takes no keys, and closes before it is heard out
        "has another key than the file says, or takes no keys: take a file from its own folder of keys, "
        "or leave --keys and $RALMQ_KEYS away"
    ),
}
_NO_KEY: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "lets nobody in without a key: give --keys FILE, or $RALMQ_KEYS",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: (  # where it closes before it is heard out
        "lets nobody in without a key, or is no broker: give --keys FILE, or $RALMQ_KEYS, or another address"
    ),
}
_MEANT: dict[int, tuple[int, ...]] = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: (zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH,)
}  # else: no broker at all
_OPTIONS = (
    (zmq.LINGER, LINGER_MS),
    (zmq.IMMEDIATE, 1),  # what was meant for one connection is void on the next, and must not come first there
    (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
    (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
    (zmq.RECONNECT_IVL, RECONNECT_MS),
    (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
    (zmq.CONNECT_TIMEOUT, CONNECT_MS),
    (zmq.MAXMSGSIZE, MAX_MESSAGE + (1 << 20)),
)
