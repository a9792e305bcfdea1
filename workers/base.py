"""What a worker class is. Knows requests and replies; no socket, no event loop of its own."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from ..schema.frame import Prefix
from ..schema.message import Beat, Direct, Span
from ..schema.tensor import Tensor

if TYPE_CHECKING:
    from ..client.client import Client
    from ..client.link import Link

Answer = Any  # None, a map, or (map, tensors); see `answer_parts`
ELSEWHERE: Final = object()  # an answer that another peer sends: the last stage of a pipeline, for its leader


@dataclass(slots=True)
class Request:
    """What a worker is asked.

    Attributes:
        body: the asker's map.
        tensors: with `.numpy()`; views into the received frames.
        id, attempt: name the request in logs and in requests made on its behalf.
        deadline: event-loop time at which the broker gives it up; 0 for none.
        service: which of the worker's services was asked.
        priority: 0 to 9, the highest first; what waits in the broker comes in that order already.
        wait: seconds that its asker would wait for a service that nobody offers; so for those that it needs in turn.
    """

    service: str
    body: dict[str, Any] = field(default_factory=dict)
    tensors: Sequence[Tensor] = ()
    id: bytes = b""
    attempt: int = 0
    deadline: float = 0.0
    until: int = 0  # parts that may be sent; 0 for no bound
    ending: dict[str, Any] = field(default_factory=dict)  # what a stream says at its end
    granted: Callable[[], None] | None = None  # called when `until` has grown
    priority: int = 4
    wait: float = 0.0


class Hosting(Protocol):
    """What a worker has of the process part that runs it; a `Host` is one.

    Attributes:
        url: the broker's address.
        client: for requests of its own; made once `start` is done.
        link: to the broker; made once `start` is done.
    """

    url: str
    client: "Client"
    link: "Link"

    def asking(self, wait: float) -> "Client":
        """A client for what a worker must know in `start`; opened by `async with`."""
        ...


class Worker:
    """A class that serves requests; subclass it and start it with `ralmq worker my_package:MyWorker`.

    Options of the worker are keyword arguments of `__init__` with annotations; `-o key=value` sets them.

    Attributes:
        service: name under which it is asked; several by overriding `services`.
        capacity: requests that it takes at a time.
        idempotent: whether a request may be given to another worker after this one is lost.
        stall_limit: seconds without progress, with work in hand, after which it counts as hung.
        max_batch: above 1, `handle_batch` is called with up to so many requests at once.
        max_wait: seconds that a batch waits to fill.
        identity: what it serves, in a short text; known once `start` is done. Beside workers of one service that say
            something else here it is refused: they would not answer alike. Empty: not told, and not compared.
    """

    service: str = ""
    capacity: int = 16
    idempotent: bool = False
    stall_limit: float = 30.0
    max_batch: int = 1
    max_wait: float = 0.0
    identity: str = ""
    labels: Mapping[str, Any] = MappingProxyType({})  # shown of it in `ralmq status`; known once `start` is done
    host: Hosting

    @property
    def services(self) -> tuple[str, ...]:
        """All names under which it is asked."""
        return (self.service,) if self.service else ()

    async def start(self) -> None:
        """Loads what takes long; called before the worker announces itself."""

    async def stop(self) -> None:
        """Called once, after the last request."""

    def handle(self, request: Request) -> Awaitable[Answer] | AsyncIterator[Answer]:
        """Serves a request: a coroutine that returns its answer, or an async generator whose yields are parts.

        A plain method that returns a future does as well.

        An answer is None, a map, or a pair of a map and a list of tensors, which must not change afterwards: large ones
        are sent from where they lie. When the asker gives up, the coroutine is cancelled. What it raises reaches the
        asker: ralmq errors as they are, others as WorkerFailed.
        """
        raise NotImplementedError(f"{type(self).__name__} has no handle()")

    async def handle_batch(self, requests: list[Request]) -> list[Answer]:
        """Serves several requests at once; one answer each, or an exception object in its place."""
        raise NotImplementedError(f"{type(self).__name__} has max_batch > 1 and no handle_batch()")

    # -- for workers that are part of the machinery, such as a pipeline stage

    @property
    def span(self) -> Span | None:
        """The layers that a pipeline stage offers; known once `start` is done."""
        return None

    @property
    def direct(self) -> Direct | None:
        """Where neighbours reach it without the broker; known once `start` is done."""
        return None

    def take(self, prefix: Prefix, message: Any) -> None:
        """A message that is no request and about none in hand: FORM, STEP, GONE of a pipeline."""

    def forgotten(self) -> None:
        """The broker forgot this worker: whatever it had in hand is void."""

    async def ready(self) -> None:
        """Awaited after that, before the worker is announced again. What it raises ends the worker."""

    def beat(self, beat: Beat) -> Beat:
        """The BEAT that is about to be sent, which counts the turns of the event loop as progress."""
        return beat


def answer_parts(answer: Answer) -> tuple[dict[str, Any], Sequence[Any]]:
    """Body and tensors of what a handler returned or yielded.

    Raises:
        TypeError: neither None, a map, nor a pair of map and list.
    """
    if answer is None:
        return {}, ()
    if isinstance(answer, dict):
        return answer, ()
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], dict):
        return answer
    raise TypeError(f"a worker answers with a map, or a map and a list of tensors, not with {type(answer).__name__}")
