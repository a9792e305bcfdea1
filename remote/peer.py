"""A caller's session with one worker: handles, calls in their order, answers. Knows ways, not what is computed."""

import asyncio
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any, Final, Protocol

from ..client.client import Client
from ..client.results import Reply
from ..client.stream import Stream
from ..schema.errors import ConnectionClosed, DeadlineExceeded, Malformed, NoService, RalmqError, WorkerLost
from ..schema.tensor import Tensor
from .failures import raised, told
from .straight import Straight, Unsent
from .values import Ref

LASTING: Final = 4_000_000.0  # seconds of a session: no deadline
FREE: Final = 0.25  # seconds after which handles are freed where no call goes there
RETURN: Final = 3.0  # seconds that a worker has to come back to a broker that was lost
FREED: Final = 16_384  # handles that are freed with one call
UNDER_WAY: Final = 512  # calls through the broker at a time
LARGE: Final = 1 << 16  # bytes of a tensor that is sent from where it lies, where that can be at once
LOOK: Final = 5.0  # seconds in which the broker says who is there
MOST: Final = 10  # of those that an error names
SERVICE: Final = "module:"
CLOSED: Final = (
    "the connection was closed, and its workers have freed what they had: call ralmq.remote.connect(url), and copy "
    "modules and tensors to them again"
)
Answer = tuple[dict[str, Any], Sequence[Tensor]]


class Handle:
    """A value on a worker; freed there when nobody has it any more.

    Attributes:
        of_grad: it is a gradient of the worker's own, which changes with later ones.
    """

    __slots__ = ("__weakref__", "number", "of_grad", "peer")

    def __init__(self, peer: "Peer", number: int) -> None:
        self.peer = peer
        self.number = number
        self.of_grad = False
        weakref.finalize(self, peer.freed.append, number).atexit = False

    def ref(self, reader: "Peer") -> Ref:
        """How a worker finds it."""
        if reader is self.peer:
            return Ref(self.number)
        near = self.peer.near if reader.near and reader.host == self.peer.host else ""
        return Ref(self.number, self.peer.service, self.peer.session, near)


class Pending:
    """A call under way; `keeps` are handles that must live until it has ended."""

    __slots__ = ("future", "keeps", "peer")

    def __init__(self, peer: "Peer", keeps: Iterable[Handle]) -> None:
        self.peer = peer
        self.future: Future[Answer] = Future()
        self.keeps = tuple(keeps)

    def result(self, within: float | None = None) -> Answer:
        """Its answer.

        Raises:
            Exception: what it raised on the worker.
            WorkerLost: the worker has ended.
            DeadlineExceeded: it has not ended in time.
        """
        seconds = self.peer.home.deadline if within is None else within
        self.leave()
        try:
            answer = self.future.result(seconds)
        except Late:
            raise DeadlineExceeded(
                f"{self.peer.name} did not answer within {seconds:g} s: raise the deadline, or see `ralmq status`"
            ) from None
        if "error" in answer[0]:
            raise raised(answer[0]["error"])  # each time a new one: it keeps the frames that it goes through alive
        return answer

    def leave(self) -> "Pending":
        """Sends it now, if it has not left: somebody waits for it."""
        if not self.future.done():
            self.peer.home.now()
        return self

    def end(self, outcome: Answer | Exception) -> None:
        for handle in self.keeps:
            handle.peer.reads.discard(self)
        self.keeps = ()
        with contextlib.suppress(Exception):  # an awaiting task gave it up
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class Caller(Protocol):
    """Whose sessions they are; a `Home` is one.

    Attributes:
        deadline: seconds for any one answer.
        received, messages: bytes of tensors, and answers, that have come.
    """

    url: str
    deadline: float
    received: int
    messages: int
    loop: asyncio.AbstractEventLoop
    client: Client
    straight: Straight

    def soon(self, peer: "Peer", action: Callable[[], None]) -> None:
        """Runs `action`, which sends to that peer, after what was handed over before."""
        ...

    def now(self, *more: "tuple[Peer, Callable[[], None]]") -> bool:
        """Sends what was handed over, and this, in this thread; False, and nothing is sent, where it cannot."""
        ...

    def peer(self, worker: str) -> "Peer":
        """The session with another worker."""
        ...


class Peer:
    """One worker.

    Attributes:
        error: why nothing on it can be used any more; None as long as it can.
        near: its door, where it is on this host, else "".
        reads: calls of others that read what lies here.
    """

    def __init__(self, home: Caller, name: str) -> None:
        self.home = home
        self.name = name
        self.service = f"{SERVICE}{name}"
        self.session = os.urandom(16)
        self.near = self.host = ""
        self.allowed: set[str] = set()
        self.error: RalmqError | None = None
        self.freed: list[int] = []  # values that nobody has any more
        self.forgotten: list[int] = []  # calls that no gradient goes back through any more
        self.reads: set[Pending] = set()
        self._direct = False  # calls go straight
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._calls = 0
        self._pending: set[Pending] = set()
        self._watch: asyncio.Task[None] | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._room: asyncio.Semaphore | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self) -> Handle:
        return Handle(self, next(self._numbers))

    def number(self) -> int:
        return next(self._numbers)

    def ask(
        self,
        verb: str,
        fields: dict[str, Any],
        tensors: Sequence[Any] = (),
        keeps: Iterable[Handle] = (),
        *,
        lent: bool = False,
    ) -> Pending:
        """Sends a call after those before it; returns at once.

        Args:
            keeps: handles among its arguments that must live until it has ended, as those of other workers.
            lent: large tensors may change once this has returned, and are copied where they cannot be sent until then.

        Raises:
            WorkerLost: the worker is gone.
        """
        if self.error is not None:
            raise type(self.error)(self.error.message, worker=self.error.worker)
        pending = Pending(self, keeps)
        for handle in pending.keeps:
            handle.peer.reads.add(pending)
        with self._lock:
            self._calls += 1
            body = {**fields, "v": verb, "c": self.session, "n": self._calls}
            self._take_freed(body)
            given = list(tensors)

            def send() -> None:
                self._send(body, given, pending)

            if lent and any(map(_large, given)):
                if self.home.now((self, send)):
                    return pending
                given = list(map(_copied, given))
            self.home.soon(self, send)
        return pending

    @property
    def under_way(self) -> int | None:
        """Calls that have left and are not answered; None where none leaves but from the event loop."""
        return len(self._pending) if self._direct and self.home.straight.open(self.near) else None

    def quiet(self, *, grads: bool = False) -> None:
        """Returns once nobody reads what lies here, or what lies here of gradients: it is about to change."""
        for pending in list(self.reads):
            if grads and not any(handle.of_grad and handle.peer is self for handle in pending.keeps):
                continue
            with contextlib.suppress(Exception):  # whoever uses it is told
                pending.result()

    # -- in the event loop

    async def open(self, within: float) -> None:
        """Opens the session. Raises as `Client.stream`."""
        try:
            stream, first = await self._opened(within, within / 3)
        except NoService:
            raise await self._absent() from None
        self.near, self.host = str(first.body.get("near", "")), str(first.body.get("host", ""))
        self.allowed = set(first.body.get("allow", []))
        self._direct = bool(self.near) and self.host == self.home.straight.host
        self._room = asyncio.Semaphore(UNDER_WAY)
        self._watch = asyncio.get_running_loop().create_task(self._watched(stream))
        self._sweep = asyncio.get_running_loop().call_later(FREE, self._swept)

    async def _opened(self, within: float, wait: float, again: bool = False) -> tuple[Stream, Reply]:
        body = {"v": "open", "c": self.session, "again": again}
        stream = self.home.client.stream(self.service, body, deadline=LASTING, wait_service=wait)
        try:
            async with asyncio.timeout(within):
                return stream, await anext(stream)
        except TimeoutError:
            await stream.aclose()
            raise DeadlineExceeded(f"{self.name} opened no session within {within:g} s: see `ralmq status`") from None
        except StopAsyncIteration:
            raise WorkerLost(f"the worker {self.name} has closed this session: copy its modules again") from None

    async def _absent(self) -> NoService:
        """How to start the worker that is not there, and which ones are, where the broker says it."""
        there = "see `ralmq status`"
        with contextlib.suppress(RalmqError):
            services = (await self.home.client.status(deadline=LOOK))["services"]
            own = [name for name, told in services.items() if name.startswith(SERVICE) and told["workers"]]
            names = [name.removeprefix(SERVICE) for name in own[:MOST]] + ["..."] * (len(own) > MOST)
            there = f"there are {', '.join(names)}" if names else "there is no module worker yet"
        command = f"ralmq worker module -o name={self.name} --broker {self.home.url}"
        return NoService(f"no module worker is called {self.name}: start it with `{command}`; {there}")

    async def leave(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        self.lose(ConnectionClosed(CLOSED))

    def lose(self, error: RalmqError) -> None:
        """Nothing of it can be used any more; who waits is told."""
        if self.error is None:
            self.error = error
        if self._sweep is not None:
            self._sweep.cancel()
        if self._direct:
            self.home.straight.forget(self.near, self.error)
        for pending in list(self._pending):
            self._ended(pending, self.error)

    async def _watched(self, stream: Stream) -> None:
        """Keeps the session: where the broker was lost alone, the worker still has what this caller had."""
        error: RalmqError = WorkerLost(f"the worker {self.name} has closed this session: copy its modules again")
        try:
            while self.error is None:
                try:
                    async for _ in stream:
                        pass
                    break
                except WorkerLost:
                    await stream.aclose()
                    stream, _ = await self._opened(2 * RETURN, RETURN, again=True)
        except RalmqError as found:
            error = found if isinstance(found, WorkerLost) else WorkerLost(f"{self.name} is lost: {found.message}")
        finally:
            await stream.aclose()
        self.lose(error)

    def _send(self, body: dict[str, Any], tensors: Sequence[Any], pending: Pending) -> None:
        self._pending.add(pending)
        if self.error is not None:
            self._ended(pending, self.error)
            return
        if self._direct:
            try:
                self.home.straight.ask(self.near, body, tensors, lambda end: self._straight(body, pending, end))
            except Malformed as error:
                self.home.loop.call_soon_threadsafe(self._failed, body, pending, error)
            except RalmqError as error:  # its door is none
                self._ended(pending, error)
        else:
            task = self.home.loop.create_task(self._brokered(body, tensors, pending))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _straight(self, body: dict[str, Any], pending: Pending, end: Any) -> None:
        if isinstance(end, Unsent):
            self._failed(body, pending, Malformed(end.message))
        else:
            self._came(pending, end)

    def _failed(self, body: dict[str, Any], pending: Pending, error: RalmqError) -> None:
        """What does not fit into a message has a number all the same: in its place comes why its value does not."""
        if body["v"] == "fail":
            self._ended(pending, error)
            self.lose(WorkerLost(f"a call to {self.name} is lost, for which others wait: copy its modules again"))
            return
        kept = ("c", "n", "out", "wants", "free", "forget")
        place = {key: body[key] for key in kept if key in body}
        with self.home.straight.together():
            self._send({**place, "v": "fail", "said": told(error)}, (), pending)

    async def _brokered(self, body: dict[str, Any], tensors: Sequence[Any], pending: Pending) -> None:
        assert self._room is not None
        async with self._room:
            try:
                reply = await self.home.client.request(
                    self.service, body, tensors=tensors, deadline=self.home.deadline, retries=100
                )
                self._came(pending, reply)
            except NoService as error:
                self._ended(pending, WorkerLost(f"{self.name} is lost: {error.message}"))
            except Malformed as error:
                self._failed(body, pending, error)
            except RalmqError as error:
                self._ended(pending, error)
                if self.error is None:  # it may not have come there, and those behind it wait for its number
                    later = Pending(self, ())
                    self._pending.add(later)
                    self._failed(body, later, error)

    def _came(self, pending: Pending, end: Any) -> None:
        if isinstance(end, RalmqError):
            self._ended(pending, end)
            return
        self.home.messages += 1
        self.home.received += sum(tensor.nbytes for tensor in end.tensors)
        self._ended(pending, (end.body, end.tensors))

    def _ended(self, pending: Pending, outcome: Answer | Exception) -> None:
        self._pending.discard(pending)
        pending.end(outcome)

    def _take_freed(self, body: dict[str, Any]) -> None:
        for name, numbers in (("free", self.freed), ("forget", self.forgotten)):
            if numbers:
                body[name] = numbers[:FREED]  # others are added by finalizers at any moment
                del numbers[: len(body[name])]

    def _swept(self) -> None:
        if self.error is None:
            self._sweep = self.home.loop.call_later(FREE, self._swept)
            if self.freed or self.forgotten:
                with contextlib.suppress(RalmqError):
                    self.ask("free", {})


def _large(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.nbytes >= LARGE


def _copied(tensor: Any) -> Any:
    return Tensor(tensor.dtype, tensor.shape, bytes(tensor.buffer)) if _large(tensor) else tensor
