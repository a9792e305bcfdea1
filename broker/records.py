"""One record per peer, per request and per pipeline: the broker's whole state. Knows no rule (see requests.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..schema.keys import Entry
from ..schema.message import Hello, Span

if TYPE_CHECKING:
    from .services import Service

Frames = list[Any]  # as received: bytes-like objects that are forwarded undecoded
Sent = tuple[bytes, Frames]  # routing id of a peer, and what goes to it


@dataclass(slots=True, eq=False)
class Peer:
    """A connection that said HELLO. A peer that offers services or a span is a worker; any peer may ask.

    `load` counts the requests that spend the worker's credit: those open (`serving`) and those whose asker is already
    answered while the worker has not acknowledged (`ending`).
    """

    key: bytes
    hello: Hello
    name: str
    since: float
    capacity: int = 0  # as in HELLO, or less while the rule of suspects asks for it, see `bound`
    services: list[Service] = field(default_factory=list)
    asked: dict[bytes, Record] = field(default_factory=dict)
    serving: dict[bytes, Record] = field(default_factory=dict)
    ending: dict[tuple[bytes, int], Record] = field(default_factory=dict)
    load: int = 0
    held: int = 0  # bytes of what it asked
    alone: bool = False  # has a suspect in hand, and nothing else beside it
    kept: int = 0  # services that keep it from new work until a suspect can have it alone
    pipeline: Pipeline | None = None
    draining: bool = False  # said BYE: gets no new work
    leaving: bool = False  # it, or a stage of the pipeline that it leads, is draining
    progress: int = -1
    progress_at: float = 0.0
    busy: int = 0
    gauges: dict[str, Any] = field(default_factory=dict)
    user: int = 0  # number of its key, 0 where keys do not rule: ids and nonces belong to one user
    entry: Entry | None = None  # what its key allows; None where keys do not rule

    @property
    def works(self) -> bool:
        return bool(self.hello.services) or self.hello.span is not None

    @property
    def owner(self) -> Peer:
        """Whose credit its work spends: its pipeline's leader, or itself."""
        return self.pipeline.leader if self.pipeline is not None else self

    def bound(self) -> None:
        """Sets the capacity after `alone` or `kept` has changed."""
        self.capacity = 1 if self.alone else 0 if self.kept else self.hello.capacity


class State(Enum):
    """Where a request is. After ENDED nothing changes any more."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Record:
    """A request from its acceptance to its one FINAL or ERROR.

    `attempt` is the asker's count of resends, `leg` the count on the worker's side: a request that is given to
    another worker raises `leg` alone, and answers of an older leg are fenced off. No leg of an id comes twice.
    `losses` counts the workers that were lost with it in hand: from the first on it is a suspect. `size` is what its
    asker is charged with, `until` the credit that CREDIT raised (0 where none came), `given` how many BEATs the
    broker had sent when it gave the request to its worker, `clean` that no worker can have begun with it, `wait` the
    end of waiting for a missing service.
    """

    id: bytes
    asker: Peer
    service: Service
    attempt: int
    deadline: float
    priority: int
    frames: Frames
    queued_at: float
    size: int
    state: State = State.QUEUED
    leg: int = 0
    losses: int = 0
    until: int = 0
    given: int = 0
    clean: bool = True
    wait: float = 0.0
    worker: Peer | None = None
    parent: Record | None = None
    children: dict[bytes, Record] | None = None


@dataclass(slots=True, eq=False)
class Pipeline:
    """Stages that cover all layers of a model, in order; the first is the leader, which takes the requests."""

    id: bytes
    model: str
    stages: list[Peer]
    after: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def leader(self) -> Peer:
        return self.stages[0]

    @property
    def spans(self) -> list[Span]:
        return [stage.hello.span for stage in self.stages if stage.hello.span is not None]
