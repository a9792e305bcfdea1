"""Simulated time and links around a real broker core. Knows frames and peers, not what peers do, and no fault."""

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ralmq.broker.core import Core
from ralmq.broker.limits import Limits
from ralmq.schema.codec import decode
from ralmq.schema.frame import read_prefix
from ralmq.schema.message import KINDS, Kind
from simulation.invariants import holds, invariants, touched
from simulation.oracle import Oracle
from simulation.wire import KIND_AT, Frames, Wire, kind_of

TICK = 0.01
SAMPLE = 400  # messages between two looks at the whole state, where a run is not strict
ONCE = (Kind.REQUEST, Kind.STEP, Kind.FORM)  # a connection brings each message once; real peers rely on it for these
TOLD = (Kind.REQUEST, Kind.FINAL, Kind.ERROR)  # what the oracle must see before the core has it
ID = slice(12, 28)
SMALL = Limits(queue=6, queue_bytes=90_000, peer_bytes=40_000, tries=3, beat=0.5, memory=1000)


class Node(Protocol):
    """What the world needs of a peer."""

    name: str
    left: bool  # it has said that it goes
    real: bool  # the product's own code

    @property
    def known(self) -> bool: ...
    def receive(self, frames: Frames) -> None: ...
    def cut(self) -> None: ...
    def end(self) -> None: ...


@dataclass(slots=True, eq=False)
class Conn:
    """One connection: a routing id, FIFO in both directions, and the times at which it breaks."""

    key: bytes
    owner: "Port"
    up_at: float = 0.0
    down_at: float = 0.0
    up_until: float = float("inf")  # what arrives later is lost
    down_until: float = float("inf")
    noticed: bool = False  # the broker's socket knows that it is broken


@dataclass(slots=True, eq=False)
class Port:
    """A node's side: its connection, what waits while there is none, and whether its process runs."""

    node: Node
    delay: float
    conn: Conn | None = None
    backlog: list[Frames] = field(default_factory=list)
    stopped: bool = False
    dead: bool = False
    inbox: list[Callable[[], None]] = field(default_factory=list)


class Network:
    """One run.

    Args:
        seed: decides everything.
        duplicate: probability that a message is delivered twice.
        trace: called with a line for each thing that happens.
        strict: the whole state is looked at after each message, and peers have the real codec; the run is the same.

    Attributes:
        steps: messages that the core or a peer was given, timers of peers, losses of connections that the core was
            told, and its ticks.
        idle: ticks among them in which nothing was due.
    """

    def __init__(
        self,
        seed: int,
        *,
        duplicate: float = 0.0,
        trace: Callable[[str], None] | None = None,
        strict: bool = False,
        digest: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 100.0 + seed % 7
        self.duplicate = duplicate
        self.doubles = bool(duplicate)  # messages came twice in this run
        self.strict = strict
        self.wire = Wire(strict)
        self.oracle = Oracle(SMALL.tries, strict)
        self.trace = trace
        self.digest = hashlib.blake2b(digest_size=16) if digest else None
        self.doom: Callable[[Node], None] = lambda node: None  # what a poisoned request does to its worker
        self.retired: Callable[[Core], None] = lambda core: None  # told of each broker that dies
        self.ports: dict[Node, Port] = {}
        self.crashes: list[BaseException] = []  # of the product's own code
        self.spoilt: set[bytes] = set()  # requests that a broken worker gave parts of
        self.steps = self.idle = 0
        self.over = False
        self.running: Any = None  # the event loop of the process that runs
        self._events: list[tuple[float, int, Callable[..., None], Any, Any]] = []
        self._count = 0
        self._conns: dict[bytes, Conn] = {}
        self._epoch = seed % 1000
        self._up = True
        self._ticks = 0
        self._looked = 0  # messages since the last look at the whole state
        self.kinds = [0] * 256  # messages that the core was given, by kind
        self.start_broker()
        self._tick()

    @property
    def counts(self) -> dict[str, int]:
        """Messages that the cores were given, by the name of their kind."""
        return {KINDS[kind].__name__: count for kind, count in enumerate(self.kinds) if count}

    # -- time

    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Runs an action later, whatever happens meanwhile."""
        self._at(self.now + delay, action)

    def later(self, node: Node, delay: float, action: Callable[[], None]) -> None:
        """Runs an action of a node later: not once it is dead, and only when it runs."""
        self._at(self.now + delay, self._inside, self.ports[node], action)

    def timer(self, node: Node, when: float, action: Callable[[], None]) -> None:
        """The same at a given time; passed over where the node is dead."""
        port = self.ports.get(node)
        if port is not None:
            self._at(max(when, self.now), self._inside, port, action)

    def run(self, until: float) -> None:
        """Lets time pass."""
        events, pop = self._events, heapq.heappop
        while events and events[0][0] <= until:
            self.now, _, action, one, other = pop(events)
            if one is None:
                action()
            else:
                action(one, other)
        self.now = until
        if self.crashes:
            raise self.crashes[0]

    def stop_all(self) -> None:
        """The run is over: whatever is left of processes says nothing any more."""
        self.over = True
        for port in list(self.ports.values()):
            port.node.end()
        self._events.clear()  # this and the next: what holds on to the many objects of the run
        self.wire.forget()
        self.oracle.restarted()
        self.oracle.executions.clear()
        self.core = Core(0, 0.0, SMALL)
        self._conns.clear()

    # -- nodes

    def join(self, node: Node) -> None:
        """A process starts."""
        self.ports[node] = Port(node, self.rng.choice([0.0003, 0.001, 0.01]))
        self._connect(self.ports[node])

    def leave(self, node: Node) -> None:
        """A process ends by itself: what it has sent still arrives."""
        port = self.ports.pop(node, None)
        if port is not None and not self.over:
            port.dead = True
            conn = port.conn
            if conn is not None:
                self._at(max(self.now, conn.up_at) + 0.001, self._notice, self.core, conn)

    def send(self, node: Node, frames: Frames) -> None:
        """A node sends to the broker; while it has no connection, messages wait for the next one."""
        port = self.ports.get(node)
        if port is None or self.over:
            return
        conn = port.conn
        if conn is None:
            port.backlog.append(frames)
            return
        rng = self.rng
        when = self.now + port.delay * (0.5 + 1.5 * rng.random())
        if when < conn.up_at:
            when = conn.up_at
        conn.up_at = when
        self._at(when, self._arrive, conn, frames)
        if self.duplicate and rng.random() < self.duplicate and (not node.real or kind_of(frames) not in ONCE):
            self._at(when, self._arrive, conn, frames)

    def key(self, node: Node) -> bytes:
        """The routing id of a node, now."""
        port = self.ports.get(node)
        return b"" if port is None or port.conn is None else port.conn.key

    def foreign(self, node: Node) -> tuple[bytes, int] | None:
        """A request in hand of another worker, with its leg."""
        key = self.key(node)
        held = self.oracle.held.items()
        found = [leg for other, legs in held if not self.oracle.together(key, other) for leg in legs]
        return self.rng.choice(found) if found else None

    def holder(self, key: bytes) -> Node | None:
        """Who has the connection of that routing id."""
        conn = self._conns.get(key)
        return None if conn is None or conn.owner.dead else conn.owner.node

    def start_broker(self) -> None:
        self._up = True
        self._epoch += 1
        self.core = Core(self._epoch, self.now, SMALL)
        self.oracle.restarted()
        self.log(f"broker of epoch {self._epoch}")
        for port in self.ports.values():
            if port.conn is None:
                self.after(self.rng.uniform(0.01, 0.4), lambda port=port: self._connect(port))  # type: ignore[misc]

    def log(self, text: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.now:9.4f} {text}")

    def look(self) -> None:
        """Looks at the whole state.

        Raises:
            Broken: something is wrong in it.
        """
        self._looked = 0
        if self._up:
            self.oracle.settle(self.core, self.now)
            invariants(self.core)

    # -- inside

    def _at(self, when: float, action: Callable[..., None], one: Any = None, other: Any = None) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, action, one, other))

    def _inside(self, port: Port, action: Callable[[], None]) -> None:
        if port.stopped:
            port.inbox.append(action)
        elif not port.dead:
            self.steps += 1
            action()

    def _connect(self, port: Port) -> None:
        if port.conn is None and not port.dead and not port.stopped and self._up:
            port.conn = Conn(self.rng.randbytes(5), port)
            self._conns[port.conn.key] = port.conn
            backlog, port.backlog = port.backlog, []
            for frames in backlog:
                self.send(port.node, frames)

    def _break(self, port: Port) -> None:
        """The connection ends; of what is under way a part arrives, and the broker's socket notices a little later."""
        conn, port.conn = port.conn, None
        if conn is not None:
            rng = self.rng
            conn.up_until = min(conn.up_until, self.now + rng.choice([0.0, 0.02]))
            conn.down_until = min(conn.down_until, self.now + rng.choice([0.0, 0.02]))
            self._at(self.now + rng.choice([0.001, 0.05, 1.0]), self._notice, self.core, conn)
            if not port.dead:
                self._at(self.now + 0.001, self._inside, port, port.node.cut)

    def _heartbeat(self, port: Port) -> None:
        if port.stopped and port.conn is not None:
            self._break(port)

    def _resume(self, port: Port) -> None:
        port.stopped = False
        inbox, port.inbox = port.inbox, []
        for action in inbox:
            self._inside(port, action)
        if port.conn is None:
            self._connect(port)

    def _notice(self, core: Core, conn: Conn) -> None:
        if core is self.core and self._up:
            self.steps += 1
            conn.noticed = True
            self._deliver(core.lost(self.now, conn.key))

    def _arrive(self, conn: Conn, frames: Frames) -> None:
        """A message reaches the broker."""
        if not self._up or self._conns.get(conn.key) is not conn or self.now > conn.up_until:
            return
        head = frames[0]
        kind = head[KIND_AT]
        if self.trace is not None:
            self.log(f"{conn.owner.node.name} -> {_shown(frames)}")
        if self.digest is not None:
            self.digest.update(b"%r %b" % (self.now, conn.key) + b"".join(frames))
        self.kinds[kind] += 1
        self.steps += 1
        if kind in TOLD:
            self.oracle.arrives(self.core, self.now, conn.key, read_prefix(head), frames)
        sent = self.core.step(self.now, conn.key, frames)
        if sent:
            self._deliver(sent)
        elif self.oracle.peers != len(self.core.roster.peers) or kind in TOLD:
            self._check(sent)
        if not self.strict:
            touched(self.core, conn.key, head[ID])

    def _tick(self) -> None:
        self._at(self.now + TICK, self._tick)
        if self._up:
            sent = self.core.tick(self.now)
            self._ticks += 1
            self.steps += 1
            if sent:
                self._deliver(sent)
                return
            self.idle += 1
            if not self._ticks % 4:
                self.oracle.late(self.now)

    def _deliver(self, sent: list[tuple[bytes, Frames]]) -> None:
        """Sends what a step yields, in order; a peer that is found lost meanwhile makes more, behind it."""
        self._check(sent)
        for key, frames in sent:
            conn = self._conns.get(key)
            if conn is None or conn.noticed:
                self._undelivered(key, sent)
            else:
                self._down(conn, frames)

    def _undelivered(self, key: bytes, pending: list[tuple[bytes, Frames]]) -> None:
        """The peer is found lost; what follows from that is sent behind the rest."""
        more = self.core.lost(self.now, key)
        self._check(more)
        pending += more

    def _down(self, conn: Conn, frames: Frames) -> None:
        port, rng = conn.owner, self.rng
        if self.trace is not None:
            self.log(f"  {port.node.name} <- {_shown(frames)}")
        when = self.now + port.delay * (0.5 + 1.5 * rng.random())
        if when < conn.down_at:
            when = conn.down_at
        conn.down_at = when
        self._at(when, self._reach, conn, frames)
        if self.duplicate and rng.random() < self.duplicate and (not port.node.real or kind_of(frames) not in ONCE):
            self._at(when, self._reach, conn, frames)

    def _check(self, sent: list[tuple[bytes, Frames]]) -> None:
        self.oracle.sends(self.core, self.now, sent)
        if self.core._out or self.core.requests.left:
            holds(False, "messages were left unsent, or a leaving worker was left waiting")
        if sent:
            self._looked += 1
            if self.strict or self._looked >= SAMPLE:
                self.look()

    def _reach(self, conn: Conn, frames: Frames) -> None:
        if self.now <= conn.down_until:
            port = conn.owner
            if port.stopped:
                port.inbox.append(lambda: port.node.receive(frames))
            elif not port.dead:
                self.steps += 1
                port.node.receive(frames)


def _shown(frames: Frames) -> str:
    prefix, message = decode(frames)
    return f"{prefix.id.hex()[:6]}/{prefix.attempt} seq {prefix.sequence} epoch {prefix.epoch} {message}"
