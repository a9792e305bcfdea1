"""The link to the broker: handshake, beats, reconnection, requests under way. Knows nothing of what they mean.

A worker is a link that also serves: it announces an offer and takes the messages that are no answers.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import zmq

from ..schema.codec import decode, encode
from ..schema.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    Malformed,
    NoBroker,
    RalmqError,
    Refused,
    RequestCancelled,
    WorkerFailed,
    error_of,
)
from ..schema.frame import Prefix, read_prefix, restamped
from ..schema.keys import key_for
from ..schema.limits import MAX_DEADLINE_MS, NO_ID
from ..schema.message import PLEASE, Beat, Bye, Cancel, Credit, Error, Gone, Hello, Kind, Partial, Request, Welcome
from ..schema.message import Final as End
from .pending import Pending
from .wire import Wire

log = logging.getLogger("ralmq.link")
LATE: Final = 0.05  # seconds that the broker's own deadline error may take to arrive
HELLO_AGAIN: Final = 0.5

Taker = Callable[[Prefix, Any], None]


class Link:
    """One peer's connection.

    Args:
        url: address of the broker.
        hello: what this peer announces; its nonce is drawn here.
        take: messages that are no answers (REQUEST, STEP, ...), called within the event loop.
        lost: called when the broker, or the connection to it, is gone: all state shared with it is void.
        ready: awaited before this peer announces itself again after that; False keeps it away.
        beat: makes the BEAT, once an interval.
        context: a zmq context to share, for inproc.
        keys: key file or folder of keys, see schema/keys.py; None takes $RALMQ_KEYS, "" none.
    """

    def __init__(
        self,
        url: str,
        hello: Hello,
        *,
        take: Taker | None = None,
        lost: Callable[[], None] | None = None,
        ready: Callable[[], Awaitable[bool]] | None = None,
        beat: Callable[[], Beat] = Beat,
        context: zmq.Context[Any] | None = None,
        keys: str | os.PathLike[str] | None = None,
    ) -> None:
        self.url = url
        self.epoch = 0
        self.hello = replace(hello, nonce=os.urandom(16), pid=os.getpid())
        self._take = take
        self._on_lost = lost
        self._prepare = ready
        self._return: asyncio.Task[None] | None = None
        self._beat = beat
        self._context = context
        self._keys = keys
        self._reason = ""  # why the broker does not let this peer in, as last said
        self._nameless = ""  # why its host name has no address, as last said
        self._interval = 1.0
        self._heard = 0  # the broker's last BEAT
        self._asked: dict[bytes, Pending] = {}
        self._wire: Wire | None = None
        self._known = False  # the broker has welcomed this connection
        self._ready: asyncio.Future[None] | None = None
        self._left: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, wait: float) -> None:
        """Connects and waits for the broker's WELCOME.

        Args:
            wait: seconds; float("inf") waits for as long as it takes.

        Raises:
            NoBroker: nobody answered in time.
            Refused: the url is no address, or the broker does not accept the key or what is announced.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._leaving, self._left = False, None
        self._patient = wait == float("inf")
        key = key_for(self.url, self._keys, works=self._works)
        self._wire = Wire(self.url, self._received, self._lost, self._context, key, self._no_entry, self._no_name)
        try:
            self._announce()
            await asyncio.wait_for(self._ready, None if wait == float("inf") else wait)
        except TimeoutError:
            self.close()
            missing = "start one with `ralmq up`"
            if self._nameless:
                missing = f"its host name is not known ({self._nameless}), mend it or the name service"
            raise NoBroker(f"no broker answers at {self.url} after {wait:g} s: {missing}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves at once; whatever is under way ends with ConnectionClosed."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        for waiting in (self._timer, self._return):
            if waiting is not None:
                waiting.cancel()
        for pending in list(self._asked.values()):
            pending.end(ConnectionClosed("the link was closed before the answer", request_id=pending.id))
        self._asked.clear()
        if self._known and not self._works:
            wire.send(encode(Bye(), epoch=self.epoch))
        self._known = False
        self._depart()
        wire.close()

    async def leave(self) -> None:
        """A worker's drain: says BYE and waits until the broker has nothing open for it, or is itself gone."""
        self._leaving = True
        if self._known:
            if self._left is None:
                self._left = self._loop.create_future()
                self.send(Bye())
            await asyncio.shield(self._left)

    def send(self, message: Any, *, id: bytes = NO_ID, attempt: int = 0, sequence: int = 0, flags: int = 0) -> None:
        """Sends a message that is no request; passed over while the broker is away, since its state is void then."""
        if self._wire is not None and self._known:
            frames = encode(message, id=id, attempt=attempt, sequence=sequence, epoch=self.epoch, flags=flags)
            self._wire.send(frames)

    def ask(
        self,
        service: str,
        body: dict[str, Any] | None = None,
        tensors: Sequence[Any] = (),
        *,
        deadline: float,
        priority: int = 4,
        window: int = 0,
        parent: bytes | None = None,
        wait_service: float = 0.0,
    ) -> Pending:
        """Sends a request; its answer comes through the object returned.

        Args:
            deadline: seconds until it fails with DeadlineExceeded.
            window: parts that may be under way, for a stream; 0 for no bound.
            wait_service: seconds that it may wait for a service that nobody offers yet.

        Raises:
            ConnectionClosed: the link is not open.
            Malformed: body or tensors cannot travel.
            Refused: a time to wait for the service that is out of range.
        """
        if self._wire is None:
            raise ConnectionClosed("the client is closed: open it with `async with ralmq.connect(url)`")
        if not 0 <= wait_service < MAX_DEADLINE_MS / 1000:
            raise Refused(f"wait_service of {wait_service} s is out of range: give seconds, or 0")
        request = Request(service, priority, window, parent, int(wait_service * 1000), body or {}, tensors)
        identity = os.urandom(16)
        frames = encode(request, id=identity)
        pending = Pending(identity, frames, self._loop.time() + deadline, window)
        pending.grant = lambda until: self.send(Credit(until), id=identity, attempt=pending.attempt)
        pending.timer = self._loop.call_at(pending.deadline + LATE, self._expired, pending)
        self._asked[identity] = pending
        if self._known:
            self._send_request(pending)
        return pending

    def cancel(self, pending: Pending, why: RalmqError | None = None) -> None:
        """Gives a request up; nothing of it arrives any more. Whoever still reads it gets `why`."""
        if self._asked.pop(pending.id, None) is not None and not pending.ended:
            self.send(Cancel(), id=pending.id, attempt=max(0, pending.attempt))
            pending.end(why or RequestCancelled("given up by the asker", request_id=pending.id))

    # -- inside

    def _send_request(self, pending: Pending) -> None:
        if self._wire is None:
            return
        left = max(1, int((pending.deadline - self._loop.time()) * 1000))
        pending.sent += 1
        head = restamped(pending.frames[0], attempt=pending.attempt, deadline=left, epoch=self.epoch)
        self._wire.send([head, *pending.frames[1:]])
        if pending.granted > pending.window:  # a repeated stream begins with parts that have been read
            self.send(Credit(pending.granted), id=pending.id, attempt=pending.attempt)

    def _expired(self, pending: Pending) -> None:
        """The broker's own deadline error did not come: it is away, or its connection is cut."""
        where = "no answer in time" if self._known else f"the broker at {self.url} is away"
        text = f"{where}: raise the deadline, or see `ralmq status`"
        self.cancel(pending, DeadlineExceeded(text, request_id=pending.id))

    def _announce(self) -> None:
        """HELLO, again until WELCOME comes; then BEATs."""
        if self._wire is None or (self._leaving and not self._known):
            return
        self._timer = self._loop.call_later(self._interval if self._known else HELLO_AGAIN, self._announce)
        if self._wire.blocked:
            return  # the one before has not left yet
        if not self._known:
            self._wire.send(encode(self.hello))
            return
        try:
            self.send(replace(self._beat(), heard=self._heard))
        except Exception:  # of a worker's own beat(): without any BEAT it would be taken for hung
            log.exception("%s cannot say how it is: a plain BEAT is sent", self.hello.name)
            self.send(Beat())

    def _received(self, frames: list[Any]) -> None:
        try:
            prefix, message = decode(frames)
        except Malformed as error:
            self._not_understood(frames, error)
            return
        if isinstance(message, Welcome):
            self._enter(prefix.epoch, message)
        elif isinstance(message, Gone) and prefix.id == NO_ID:
            self._lost()
        elif not self._known or prefix.epoch != self.epoch:
            if isinstance(message, Error) and prefix.id == NO_ID:
                self._refused(error_of(message.code, message.message))
        elif isinstance(message, Partial | End | Error) and (pending := self._asked.get(prefix.id)) is not None:
            pending.take(prefix, message)
            if pending.ended:
                del self._asked[prefix.id]
                if isinstance(message, Partial):  # it ended on this side: its worker goes on
                    self.send(Cancel(), id=prefix.id, attempt=prefix.attempt)
        elif isinstance(message, Beat):
            self._heard = message.progress
        elif isinstance(message, Bye) and prefix.attempt != PLEASE:
            self._depart()
        elif self._take is not None:
            self._take(prefix, message)

    def _enter(self, epoch: int, welcome: Welcome) -> None:
        if self._known and epoch == self.epoch:
            return  # the answer to a HELLO that was sent twice
        self._known, self.epoch, self._reason, self._heard = True, epoch, "", 0
        self._interval = welcome.beat_ms / 1000
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._interval, self._announce)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        for pending in list(self._asked.values()):
            self._send_request(pending)

    def _lost(self) -> None:
        """The connection was cut, or the broker does not know it: it was restarted, or took this peer for dead."""
        if not self._known or self._wire is None:
            return
        self._known = False
        self._wire.forget()
        if self._timer is not None:
            self._timer.cancel()
        self._depart()
        if self._on_lost is not None:
            self._on_lost()
        if self._prepare is None:
            self._announce()
        elif self._return is None or self._return.done():
            self._return = self._loop.create_task(self._come_back(self._prepare))

    async def _come_back(self, prepare: Callable[[], Awaitable[bool]]) -> None:
        if await prepare() and not self._known:
            self._announce()

    @property
    def _works(self) -> bool:
        return bool(self.hello.services) or self.hello.span is not None

    def _no_entry(self, reason: str, certain: bool) -> None:
        """Who waits for a broker as long as it takes is not turned away by what may be a broker that is not up yet."""
        if reason == self._reason:  # once, however often it is tried
            return
        self._reason = reason
        if certain or not self._patient:
            self._refused(Refused(f"the broker at {self.url} {reason}"))
        else:
            log.warning("%s goes on trying: the broker at %s %s", self.hello.name, self.url, reason)

    def _no_name(self, reason: str) -> None:
        """The broker's host name has no address, for now; it has one where there is no reason."""
        if reason and reason != self._nameless and self._patient:
            log.warning("%s goes on trying: the host name of %s is not known (%s)", self.hello.name, self.url, reason)
        self._nameless = reason

    def _depart(self) -> None:
        if self._left is not None and not self._left.done():
            self._left.set_result(None)

    def _not_understood(self, frames: list[Any], error: Malformed) -> None:
        """Frames that are no message: where they name a request, it ends here, and not by its deadline."""
        try:
            prefix = read_prefix(frames[0])
        except Malformed:
            self._refused(error)
            return
        if not self._known or prefix.epoch != self.epoch:
            self._refused(error)
        elif prefix.kind == Kind.STEP:
            log.error("%s leaves its pipeline: a STEP cannot be read (%s)", self.hello.name, error.message)
            self.renew("a STEP cannot be read")
        elif prefix.kind == Kind.REQUEST:
            self.send(Error(error.code, error.message), id=prefix.id, attempt=prefix.attempt)
        elif (pending := self._asked.get(prefix.id)) is not None and prefix.attempt == pending.attempt:
            text = f"the answer cannot be read: {error.message}"
            self.cancel(pending, WorkerFailed(text, request_id=pending.id))

    def renew(self, why: str) -> None:
        """Announces this peer as another: the broker ends what the old one had in hand, with an answer for each."""
        log.error("%s announces itself anew: %s", self.hello.name, why)
        self.hello = replace(self.hello, nonce=os.urandom(16))
        self._lost()

    def _refused(self, error: RalmqError) -> None:
        """What the broker says of HELLO itself ends `open`; later there is no one to tell but the log."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        elif error.message != self._reason:  # once, however often it is tried
            self._reason = error.message
            log.warning("%s: the broker refuses what is sent: %s", self.hello.name, error.message)
