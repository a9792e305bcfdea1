"""Simulated time, links and faults around a real broker core. Knows frames and peers, not what peers do."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ralmq.broker.core import Core
from ralmq.broker.limits import Limits
from ralmq.schema.codec import decode
from ralmq.schema.frame import read_prefix
from ralmq.schema.message import KINDS
from simulation.invariants import invariants
from simulation.oracle import Oracle

Frames = list[Any]
TICK = 0.01
SMALL = Limits(queue=6, queue_bytes=90_000, peer_bytes=40_000, tries=3, beat=0.5, memory=1000)


class Node(Protocol):
    """What the world needs of a peer."""

    name: str
    known: bool
    left: bool

    def receive(self, frames: Frames) -> None: ...


@dataclass(eq=False)
class Conn:
    """One connection: a routing id, FIFO in both directions, and the times at which it breaks."""

    key: bytes
    owner: "Port"
    up_at: float = 0.0
    down_at: float = 0.0
    up_until: float = float("inf")  # what arrives later is lost
    down_until: float = float("inf")
    noticed: bool = False  # the broker's socket knows that it is broken


@dataclass(eq=False)
class Port:
    """A node's side: its connection, what waits while there is none, and whether its process runs."""

    node: Node
    delay: float
    conn: Conn | None = None
    backlog: list[Frames] = field(default_factory=list)
    stopped: bool = False
    dead: bool = False
    inbox: list[Callable[[], None]] = field(default_factory=list)


class World:
    """One run.

    Args:
        seed: decides everything.
        duplicate: probability that a message is delivered twice.
        trace: called with a line for each thing that happens.
    """

    def __init__(self, seed: int, *, duplicate: float = 0.0, trace: Callable[[str], None] | None = None) -> None:
        self.rng = random.Random(seed)
        self.now = 100.0 + seed % 7
        self.duplicate = duplicate
        self.oracle = Oracle(SMALL.tries)
        self.trace = trace
        self.doom: Callable[[Node], None] = self.kill  # what a poisoned request does to its worker
        self.ports: dict[Node, Port] = {}
        self.steps = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._conns: dict[bytes, Conn] = {}
        self._epoch = seed % 1000
        self._up = True
        self._ticks = 0
        self.counts: dict[str, int] = {}
        self.start_broker()
        self._tick()

    # -- time

    def after(self, delay: float, action: Callable[[], None]) -> None:
        """Runs an action later, whatever happens meanwhile."""
        self._at(self.now + delay, action)

    def later(self, node: Node, delay: float, action: Callable[[], None]) -> None:
        """Runs an action of a node later: not once it is dead, and only when it runs."""
        port = self.ports[node]
        self._at(self.now + delay, lambda: self._inside(port, action))

    def run(self, until: float) -> None:
        """Lets time pass."""
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until

    # -- nodes

    def join(self, node: Node) -> None:
        """A process starts."""
        self.ports[node] = Port(node, self.rng.choice([0.0005, 0.003, 0.03]))
        self._connect(self.ports[node])

    def send(self, node: Node, frames: Frames) -> None:
        """A node sends to the broker; while it has no connection, messages wait for the next one."""
        port = self.ports[node]
        if port.conn is None:
            port.backlog.append(frames)
            return
        conn = port.conn
        conn.up_at = max(conn.up_at, self.now + port.delay * self.rng.uniform(0.5, 2.0))
        for _ in range(2 if self.rng.random() < self.duplicate else 1):
            self._at(conn.up_at, lambda: self._arrive(conn, frames))

    # -- faults

    def cut(self, node: Node) -> None:
        """The connection is lost; libzmq makes another by itself, with another routing id."""
        port = self.ports[node]
        self._break(port)
        self.after(self.rng.uniform(0.01, 1.0), lambda: self._connect(port))
        self.log(f"cut {node.name}")

    def kill(self, node: Node) -> None:
        """The process dies."""
        port = self.ports.pop(node)
        port.dead = True
        self._break(port)
        self.log(f"kill {node.name}")

    def stop(self, node: Node, seconds: float) -> None:
        """SIGSTOP, SIGCONT later; heartbeats may find it dead meanwhile."""
        port = self.ports[node]
        if port.stopped:
            return
        port.stopped = True
        self.after(seconds, lambda: self._resume(port))
        if self.rng.random() < 0.5:
            self.after(0.6, lambda: self._heartbeat(port))
        self.log(f"stop {node.name} for {seconds:.2f} s")

    def slow(self, node: Node, seconds: float) -> None:
        """Everything to and from the node is late for a while."""
        port = self.ports[node]
        if port.conn is not None:
            port.conn.up_at = max(port.conn.up_at, self.now + seconds)
            port.conn.down_at = max(port.conn.down_at, self.now + seconds)
            self.log(f"delay {node.name} by {seconds:.2f} s")

    def refuse(self, node: Node) -> None:
        """The broker's socket finds that the peer does not take what is sent; the connection itself stays."""
        conn = self.ports[node].conn
        if conn is not None and self._up:
            self.log(f"refuse {node.name}")
            self._deliver(self.core.lost(self.now, conn.key, "did not take what was sent to it"))

    def key(self, node: Node) -> bytes:
        """The routing id of a node, now."""
        conn = self.ports[node].conn
        return b"" if conn is None else conn.key

    def holder(self, key: bytes) -> Node | None:
        """Who has the connection of that routing id."""
        conn = self._conns.get(key)
        return None if conn is None or conn.owner.dead else conn.owner.node

    def restart_broker(self) -> None:
        """The broker dies and comes back with another epoch and nothing in its tables."""
        if not self._up:
            return
        self._up = False
        for port in self.ports.values():
            self._break(port)
        self._conns.clear()
        self.log("broker dies")
        self.after(self.rng.uniform(0.05, 1.5), self.start_broker)

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

    # -- inside

    def _at(self, when: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, action))

    def _inside(self, port: Port, action: Callable[[], None]) -> None:
        if port.stopped:
            port.inbox.append(action)
        elif not port.dead:
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
            conn.up_until = self.now + self.rng.choice([0.0, 0.02])
            conn.down_until = self.now + self.rng.choice([0.0, 0.02])
            core = self.core
            self.after(self.rng.choice([0.001, 0.05, 1.0]), lambda: self._notice(core, conn))

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
            conn.noticed = True
            self._deliver(core.lost(self.now, conn.key))

    def _arrive(self, conn: Conn, frames: Frames) -> None:
        """A message reaches the broker."""
        if not self._up or self._conns.get(conn.key) is not conn or self.now > conn.up_until:
            return
        prefix = read_prefix(frames[0])
        if self.trace is not None:
            self.log(f"{conn.owner.node.name} -> {_shown(frames)}")
        self.counts[KINDS[prefix.kind].__name__] = self.counts.get(KINDS[prefix.kind].__name__, 0) + 1
        self.steps += 1
        self.oracle.arrives(self.core, self.now, conn.key, prefix, frames)
        self._deliver(self.core.step(self.now, conn.key, frames))

    def _tick(self) -> None:
        self.after(TICK, self._tick)
        if self._up:
            self._ticks += 1
            sent = self.core.tick(self.now)
            if sent or not self._ticks % 4:
                self._deliver(sent)

    def _deliver(self, sent: list[tuple[bytes, Frames]]) -> None:
        """Sends what a step yields, in order; a peer that is found lost meanwhile makes more, behind it."""
        self._check(sent)
        pending = list(sent)
        for key, frames in pending:  # grows while it runs
            conn = self._conns.get(key)
            if conn is None or conn.noticed:
                more = self.core.lost(self.now, key)
                self._check(more)
                pending += more
                continue
            port = conn.owner
            if self.trace is not None:
                self.log(f"  {port.node.name} <- {_shown(frames)}")
            conn.down_at = max(conn.down_at, self.now + port.delay * self.rng.uniform(0.5, 2.0))
            for _ in range(2 if self.rng.random() < self.duplicate else 1):
                self._at(conn.down_at, lambda conn=conn, frames=frames: self._reach(conn, frames))  # type: ignore[misc]

    def _check(self, sent: list[tuple[bytes, Frames]]) -> None:
        self.oracle.sends(self.core, self.now, sent)
        if sent:
            invariants(self.core)

    def _reach(self, conn: Conn, frames: Frames) -> None:
        if self.now <= conn.down_until:
            self._inside(conn.owner, lambda: conn.owner.node.receive(frames))


def _shown(frames: Frames) -> str:
    prefix, message = decode(frames)
    return f"{prefix.id.hex()[:6]}/{prefix.attempt} seq {prefix.sequence} epoch {prefix.epoch} {message}"
