"""The link to the broker: handshake, beats, reconnection, requests under way. Knows nothing of what they mean.

A worker is a link that also serves: it announces an offer and takes the messages that are no answers.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import zmq

from ..schema.codec import decode, encode
from ..schema.errors import ConnectionClosed, DeadlineExceeded, Malformed, NoBroker, RalmqError, Refused, error_of
from ..schema.frame import Prefix, restamped
from ..schema.limits import MAX_DEADLINE_MS, NO_ID
from ..schema.message import Beat, Bye, Cancel, Credit, Error, Gone, Hello, Partial, Request, Welcome
from ..schema.message import Final as End
from .pending import Pending
from .wire import Wire

LATE: Final = 0.05  # seconds that the broker's own deadline error may take to arrive
HELLO_AGAIN: Final = 0.5

Taker = Callable[[Prefix, Any], None]


class Link:
    """One peer's connection.

    Args:
        url: address of the broker.
        hello: what this peer announces; its nonce is drawn here.
        take: messages that are no answers (REQUEST, STEP, ...), called within the event loop.
        welcomed: called after each WELCOME that follows a loss: all state shared with the broker is void.
        beat: makes the BEAT, once an interval.
        context: a zmq context to share, for inproc.
    """

    def __init__(
        self,
        url: str,
        hello: Hello,
        *,
        take: Taker | None = None,
        welcomed: Callable[[], None] | None = None,
        beat: Callable[[], Beat] = Beat,
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self.url = url
        self.epoch = 0
        self.hello = replace(hello, nonce=os.urandom(16), pid=os.getpid())
        self._take = take
        self._welcomed = welcomed
        self._beat = beat
        self._context = context
        self._interval = 1.0
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
            Refused: the url is no address, or the broker does not accept what is announced.
        """
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._wire = Wire(self.url, self._received, self._context)
        self._announce()
        try:
            await asyncio.wait_for(self._ready, None if wait == float("inf") else wait)
        except TimeoutError:
            self.close()
            raise NoBroker(f"no broker answers at {self.url} after {wait:g} s: start one with `ralmq up`") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves at once; whatever is under way ends with ConnectionClosed."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        for pending in list(self._asked.values()):
            pending.end(ConnectionClosed("the client was closed before the answer", request_id=pending.id))
        self._asked.clear()
        if self._known and not self.hello.services and self.hello.span is None:
            wire.send(encode(Bye(), epoch=self.epoch))
        wire.close()

    async def leave(self) -> None:
        """A worker's drain: says BYE and waits until the broker has nothing open for it."""
        if self._known and self._wire is not None:
            self._left = self._loop.create_future()
            self.send(Bye())
            await self._left

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
            Refused: a deadline that is no positive number.
        """
        if self._wire is None:
            raise ConnectionClosed("the client is closed: open it with `async with ralmq.connect(url)`")
        if not 0 < deadline < MAX_DEADLINE_MS / 1000:
            raise Refused(f"a deadline of {deadline} s is out of range: give seconds above 0")
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

    def cancel(self, pending: Pending) -> None:
        """Gives a request up; nothing of it arrives any more."""
        if self._asked.pop(pending.id, None) is not None and not pending.ended:
            self.send(Cancel(), id=pending.id, attempt=pending.attempt)
            pending.end(ConnectionClosed("given up by the asker", request_id=pending.id))

    # -- inside

    def _send_request(self, pending: Pending) -> None:
        if self._wire is None:
            return
        left = max(1, int((pending.deadline - self._loop.time()) * 1000))
        pending.sent += 1
        head = restamped(pending.frames[0], attempt=pending.attempt, deadline=left, epoch=self.epoch)
        self._wire.send([head, *pending.frames[1:]])

    def _expired(self, pending: Pending) -> None:
        """The broker's own deadline error did not come: it is away, or its connection is cut."""
        if self._asked.pop(pending.id, None) is not None:
            self.send(Cancel(), id=pending.id, attempt=max(0, pending.attempt))
            where = "no answer in time" if self._known else f"the broker at {self.url} is away"
            pending.end(DeadlineExceeded(f"{where}: raise the deadline, or see `ralmq status`", request_id=pending.id))

    def _announce(self) -> None:
        """HELLO, again until WELCOME comes; then BEATs."""
        if self._wire is None:
            return
        if self._known:
            self.send(self._beat())
            self._timer = self._loop.call_later(self._interval, self._announce)
        else:
            self._wire.send(encode(self.hello))
            self._timer = self._loop.call_later(HELLO_AGAIN, self._announce)

    def _received(self, frames: list[Any]) -> None:
        try:
            prefix, message = decode(frames)
        except Malformed as error:
            self._refused(error)
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
        elif isinstance(message, Bye):
            if self._left is not None and not self._left.done():
                self._left.set_result(None)
        elif self._take is not None:
            self._take(prefix, message)

    def _enter(self, epoch: int, welcome: Welcome) -> None:
        if self._known and epoch == self.epoch:
            return  # the answer to a HELLO that was sent twice
        first = self.epoch == 0
        self._known, self.epoch = True, epoch
        self._interval = welcome.beat_ms / 1000
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._interval, self._announce)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
        if not first and self._welcomed is not None:
            self._welcomed()
        for pending in list(self._asked.values()):
            self._send_request(pending)

    def _lost(self) -> None:
        """The broker does not know this connection: it was restarted, or took this peer for dead."""
        if self._known and self._wire is not None:
            self._known = False
            self._wire.forget()
            if self._timer is not None:
                self._timer.cancel()
            if self._left is not None and not self._left.done():
                self._left.set_result(None)
            self._announce()

    def _refused(self, error: RalmqError) -> None:
        """What the broker says of HELLO itself ends `open`; other refusals without a request have no one to tell."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
