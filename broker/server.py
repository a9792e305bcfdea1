"""The asyncio shell around core.py: one ROUTER socket, a clock, a tick. Knows no rule of the broker.

A plain socket with its file descriptor in the event loop moves several times more messages than zmq.asyncio. The
descriptor is edge-triggered: after each batch, sends included, the socket is asked again, or it would stall.
"""

import asyncio
import contextlib
import errno
import os
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from ..schema.errors import Refused
from ..schema.limits import MAX_FRAMES, MAX_MESSAGE
from .core import DIED, Core
from .flights import LARGE, Flights
from .guard import Guard
from .limits import Limits
from .memory import give_back, resident, watermark
from .outbox import Outbox
from .records import Sent
from .watch import Taken, Watch, cut

BATCH: Final = 64  # messages a pass, so that timers and other tasks get their turn
TICK: Final = 0.01
IDLE: Final = 0.03  # seconds between ticks while no request is open and nothing waits to be sent
LAST: Final = int(zmq.NOBLOCK)  # as plain numbers: `|` of two flags costs more than the send itself
MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
READABLE: Final = int(zmq.POLLIN)
LOOKS: Final = 2  # messages of a pass that are looked for first: finding none by an exception costs four times that
HEARTBEAT_MS: Final = 500
HEARTBEAT_TIMEOUT_MS: Final = 2000
LINGER_MS: Final = 100  # closing at once amid a message can abort the process, and so can a heartbeat after that
HIGH_WATER: Final = 64  # messages to a peer, whatever their size; what it does not take beyond that waits in the outbox
FLYING: Final = 64 << 20  # bytes of large messages among them
OUT_BYTES: Final = 2 * MAX_MESSAGE  # in the outbox; a peer that takes nothing is let go beyond that
OUT_FULL: Final = 64 << 20  # the same while the memory is full
DRAWN: Final = b"\0"  # how routing ids begin that the ROUTER draws: no other connection is given the same one
LOOK: Final = 0.1  # seconds between two looks at the list of keys, and at messages that do not end
REFUSALS: Final = {  # what the monitor tells of connections that never came to be, and how it is counted
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "unknown_key",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "no_handshake",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "no_handshake",
}
WATCHED: Final = int(zmq.EVENT_ACCEPTED) | int(zmq.EVENT_DISCONNECTED) | sum(REFUSALS)


class Server:
    """A broker on one address. `async with Server(url)` binds, serves until the block ends, and closes.

    Args:
        bind: tcp://host:port (port * or 0 picks one), ipc://path or inproc://name.
        limits: bounds and rhythm, see Limits.
        context: a zmq context to share, for inproc.
        keys: folder of keys; nobody whose key is not in it gets in. None lets everybody in.

    Raises:
        Refused: the address is taken, or no address; the folder of keys is missing or broken.
    """

    def __init__(
        self,
        bind: str,
        *,
        limits: Limits | None = None,
        context: zmq.Context[Any] | None = None,
        keys: Path | None = None,
    ) -> None:
        self._bind = bind
        self._limits = limits or Limits(memory=watermark())
        self._guard = Guard(keys) if keys is not None else None
        self._watch = Watch()
        self._look_at = 0.0
        self._own = context is None
        self._context = context or zmq.Context()
        self._outbox = Outbox(OUT_BYTES)
        self._flights = Flights(FLYING)
        self._frees = not bind.startswith("inproc")  # there a frame is freed when who took it is done with it
        self._descriptors: dict[bytes, int] = {}
        self._seen: set[bytes] = set()  # those of them of which no message need be looked at
        self._dry = False  # a pass since the last look has left nothing: libzmq keeps no message
        self._taken: defaultdict[bytes, Taken] | None = None  # since then, else
        self._ended: set[bytes] = set()  # connections of which messages may be left: nobody waits for what they say
        self._clock = time.monotonic
        self._again = False
        self._closed = False

    async def __aenter__(self) -> "Server":
        self._loop = asyncio.get_running_loop()
        epoch = int.from_bytes(os.urandom(4), "little") or 1
        self.core = Core(epoch, self._clock(), self._limits)
        try:
            if self._guard is not None:
                self._guard.start(self._context)  # before anybody can connect
            self._socket = self._open()
        except BaseException:
            if self._guard is not None:
                self._guard.stop()
            if self._own:
                self._context.term()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        # the methods of the C level: the wrappers around them cost as much as they do
        plain: Any = super(zmq.Socket, cast(Any, self._socket))
        self._recv, self._send, self._events = plain.recv, plain.send, partial(plain.get, int(zmq.EVENTS))
        self._monitor = self._socket.get_monitor_socket(WATCHED)
        self._loop.add_reader(self._socket.fileno(), self._pump)
        self._loop.add_reader(self._monitor.fileno(), self._disconnected)
        self._timer = self._loop.call_later(TICK, self._tick)
        self._pump()
        self._disconnected()  # takes the edge of the monitor's own connection, or the first real one would not show
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(LINGER_MS)
        if self._guard is not None:
            self._guard.stop()
        if self._own:
            await asyncio.to_thread(self._context.term)

    def _open(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.RCVHWM, 0 if self._frees else HIGH_WATER)  # see `Watch`
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE + (1 << 20))
        if self._guard is not None:
            self._guard.arm(socket)
        try:
            socket.bind(self._bind)
        except zmq.ZMQError as error:
            socket.close(0)
            if error.errno == errno.EADDRINUSE:
                message = f"{self._bind} is taken: stop the broker that runs there, or bind another port"
            else:
                message = f"cannot bind {self._bind} ({error.strerror}): give tcp://host:port or ipc://path"
            raise Refused(message) from None
        return socket

    def _pump(self) -> None:
        """Takes what has arrived, at most a batch, and then sends what follows from it.

        Sending once a batch wakes libzmq's own thread once a batch.
        """
        self._again = False
        if self._closed:  # a pass that was asked for before
            return
        sent: list[Sent] = []
        drained = False
        try:
            drained = self._take(sent)
            if drained:
                self._dry = True
                self._ended.clear()
        finally:  # a message that cannot be served must not hold up the others
            self._deliver(sent)
            if self._outbox:
                self._retry()
            if not drained or self._events() & READABLE:
                self._pump_soon()

    def _take(self, sent: list[Sent]) -> bool:
        """Hands messages to the core and collects what is to be sent; True where no more have arrived."""
        receive, step, seen, taken = self._recv, self.core.step, self._seen, self._taken
        now = self._clock()
        try:
            for number in range(BATCH):
                if number < LOOKS and not self._events() & READABLE:
                    return True
                key = receive(LAST)
                frame = receive(LAST, False)
                frames = [frame]
                while frame.more:
                    frame = receive(LAST, False)
                    if len(frames) <= MAX_FRAMES:  # one more than allowed shows that there were too many
                        frames.append(frame)
                if taken is not None:
                    taken[key].add(frames, self._guard is not None)
                if key not in seen and not self._introduced(now, key, frames[0], sent):
                    continue
                sent += step(now, key, frames)
        except zmq.Again:
            return True
        return False

    def _introduced(self, now: float, key: bytes, frame: zmq.Frame, sent: list[Sent]) -> bool:
        """Asks what its first message tells of a connection; False where nothing of it may be taken.

        A routing id that the ROUTER drew belongs to one connection, and a connection to one key, until it ends; the
        descriptor is forgotten then, so that whoever comes next under this id is asked anew.
        """
        if key in self._ended:
            self.core.count("void")
            return False
        self._deliver(sent)  # what was decided before leaves before what may follow from a loss
        sent.clear()
        self._disconnected()  # what became of the descriptor before, and that it was opened
        descriptor = _descriptor(frame)
        if self._guard is not None:
            entry = self._guard.entry(key, frame)
            if entry is None:
                self.core.count("unauthorized")
                cut(descriptor)
                self._void(key)
                return False
            sent += self.core.introduce(now, key, entry)
        self._descriptors[key] = descriptor
        self._seen.add(key)
        self._watch.whole(descriptor)
        return True

    def _look(self) -> None:
        """What no message tells: how full the memory is, a list of keys written anew, a message that does not end."""
        memory = resident()
        if 0 < self._limits.memory < memory:
            give_back()
            memory = resident()
        full = 0 < self._limits.memory < memory
        self.core.measured(memory)
        self._outbox.bound(OUT_FULL if full else OUT_BYTES)
        self._flights.tidy()
        if self._guard is not None and self._guard.changed():
            self._revoke()
        self._look_ahead(full)
        suspects, endless = self._watch.look()
        if suspects:  # their next messages are looked at
            self._seen -= {key for key, number in self._descriptors.items() if number in suspects}
        for descriptor in endless:
            self.core.count("endless")
            cut(descriptor)

    def _look_ahead(self, full: bool) -> None:
        """Ends the connections of those that send more than is taken of them: libzmq keeps all of it.

        Who they are is counted only while the broker does not get to the end of what has arrived.
        """
        dry, self._dry = self._dry, False
        if dry:
            self._taken = None
        elif self._taken is None:
            self._taken = defaultdict(Taken)
            self._watch.mark()
        else:
            taken = {self._descriptors.get(key, -1): of for key, of in self._taken.items()}
            for number in self._watch.ahead(taken, full):
                self.core.count("flooding")
                cut(number)
                self._watch.closed(number)

    def _revoke(self) -> None:
        """Ends the connections of keys that are not in the list any more, or stand there otherwise."""
        assert self._guard is not None
        for key, entry in list(self.core.roster.entries.items()):
            if self._guard.allowed.get(entry.public) != entry:
                self.core.count("revoked")
                cut(self._descriptors.get(key, -1))
                self._void(key)
                self._deliver(self._lost(key, "has a key that was revoked"))

    def _pump_soon(self) -> None:
        if not self._again:
            self._again = True
            self._loop.call_soon(self._pump)

    def _deliver(self, sent: list[Sent]) -> None:
        """Sends; peers that turn out to be dead are told to the core afterwards, and what follows is sent as well.

        What the core decided earlier must have been through here before: a loss must not overtake a REQUEST or a FORM.
        """
        while sent:
            lost: list[tuple[bytes, str]] = []
            for key, frames in sent:
                try:
                    if key not in self._outbox:
                        self._put(key, frames)
                        continue
                except zmq.Again:
                    pass
                except zmq.ZMQError as error:
                    lost.append((key, _death(error)))
                    continue
                if not self._outbox.hold(key, frames):
                    lost.append((key, "did not take what was sent to it"))
            sent = [message for key, reason in lost for message in self._lost(key, reason)]

    def _put(self, key: bytes, frames: list[Any]) -> None:
        send, left = self._send, None
        size = len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
        if size > LARGE and self._frees:
            if not self._flights.room(key, size):
                raise zmq.Again
            frames, left = self._flights.watched(frames)
        send(key, MORE)
        for frame in frames[:-1]:
            send(frame, MORE, False)
        send(frames[-1], LAST, False)
        if left is not None:
            self._flights.add(key, size, left)

    def _retry(self) -> None:
        """Sends what is held, as far as the peers take it: a ROUTER does not tell when one of them can take more."""
        for key in self._outbox.peers():
            try:
                more = key in self._outbox  # the loss of another peer may have ended this one
                while more:
                    self._put(key, self._outbox.first(key))
                    more = self._outbox.sent(key)
            except zmq.Again:
                continue
            except zmq.ZMQError as error:
                self._deliver(self._lost(key, _death(error)))

    def _lost(self, key: bytes, reason: str) -> list[Sent]:
        if reason == DIED:
            self._void(key)
        self._outbox.drop(key)
        self._forget(key)
        return self.core.lost(self._clock(), key, reason)

    def _void(self, key: bytes) -> None:
        """The connection is over: what is left of it is dropped, unless another one may come under its routing id."""
        if key.startswith(DRAWN):
            self._ended.add(key)

    def _forget(self, key: bytes) -> None:
        self._descriptors.pop(key, None)
        self._seen.discard(key)

    def _tick(self) -> None:
        busy = self._outbox or self.core.requests.open
        self._timer = self._loop.call_later(TICK if busy else IDLE, self._tick)
        now = self._clock()
        sent = self.core.tick(now)
        self._deliver(sent)
        if now >= self._look_at:
            self._look_at = now + LOOK
            self._look()
        if self._outbox:
            self._retry()
        if sent or self._outbox:
            self._pump_soon()

    def _disconnected(self) -> None:
        """A connection ended: whoever had its descriptor is asked at once, since descriptors are used again.

        Or it failed before it began: that is counted.
        """
        with contextlib.suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                if event["event"] in REFUSALS:
                    self.core.count(REFUSALS[event["event"]])
                    continue
                if event["event"] == zmq.EVENT_ACCEPTED:
                    self._watch.opened(event["value"])
                    continue
                self._watch.closed(event["value"])
                for key in [key for key, number in self._descriptors.items() if number == event["value"]]:
                    self._forget(key)
                    self._deliver(self.core.greet(key))
        self._pump_soon()


def _death(error: zmq.ZMQError) -> str:
    if error.errno != errno.EHOSTUNREACH:
        raise error
    return DIED


def _descriptor(frame: zmq.Frame) -> int:
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:  # inproc has none
        return -1
