"""What a right broker would do, kept in tables of its own: sees lost, doubled, crossed, late and excess messages."""

from dataclasses import dataclass
from typing import Any

from ralmq.broker.core import Core
from ralmq.broker.records import Peer
from ralmq.schema.codec import decode, routing_of
from ralmq.schema.frame import Prefix, read_prefix
from ralmq.schema.message import Kind
from simulation.invariants import holds

SLACK = 0.065  # seconds: a bucket, rounding to milliseconds, and the ticks until this is looked at
AT_THE_DOOR = ("busy", "no_service", "malformed", "cancelled", "final")  # ends without a trace: same attempt again
Leg = tuple[bytes, int]  # id, and attempt of the asker or leg of the worker


@dataclass
class Live:
    """A request that the broker has taken, and must end."""

    asker: Peer
    attempt: int
    deadline: float
    service: str
    given: bool = False  # to a worker, under this attempt
    lost: int = 0  # workers that were lost with it in hand, not counting the one that has it now


class Oracle:
    """Watches all that arrives at a core and all that it sends."""

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self.live: dict[bytes, Live] = {}
        self.attempts: dict[bytes, int] = {}  # the highest one that was ended or abandoned, in this epoch
        self.fresh: Leg | None = None  # the request whose arrival is being answered
        self.held: dict[bytes, dict[Leg, None]] = {}  # worker -> what it must still end
        self.legs: dict[Leg, bytes] = {}  # each leg that was ever given to a worker, in this epoch
        self.member: dict[bytes, bytes] = {}  # stage -> pipeline, as told by FORM
        self.pipes: dict[bytes, list[bytes]] = {}  # pipeline -> its stages, the leader first
        self.suspects: set[Leg] = set()  # legs of requests whose worker was lost before
        self.executed: dict[bytes, str] = {}  # requests of services that are not idempotent
        self.tally: dict[str, int] = {}

    # -- told by the world

    def restarted(self) -> None:
        """The broker forgot everything; what workers executed stays so."""
        self.fresh = None
        for table in (self.live, self.attempts, self.held, self.legs, self.suspects, self.member, self.pipes):
            table.clear()

    def arrives(self, core: Core, now: float, key: bytes, prefix: Prefix, frames: list[Any]) -> None:
        """Before a step: what it has to do with this message."""
        peer = core.roster.peers.get(key)
        if peer is None or prefix.epoch != core.epoch:
            return
        if prefix.kind == Kind.REQUEST:
            self._requested(core, now, peer, prefix, frames)
        elif prefix.kind in (Kind.FINAL, Kind.ERROR):
            pipeline = self.member.get(key)
            leader = key if pipeline is None else self.pipes[pipeline][0]
            self.held.get(leader, {}).pop((prefix.id, prefix.attempt), None)

    def sends(self, core: Core, now: float, sent: list[tuple[bytes, list[Any]]]) -> None:
        """After a step: what it sent must follow from what it knew."""
        for key, frames in sent:
            prefix = read_prefix(frames[0])
            if prefix.kind in (Kind.FINAL, Kind.ERROR):
                self._answered(now, key, prefix, frames)
            elif prefix.kind == Kind.REQUEST:
                self._given(core, key, prefix)
            elif prefix.kind == Kind.FORM:
                self._formed(key, prefix, decode(frames)[1].place)
            elif prefix.kind == Kind.GONE and prefix.id in self.pipes:
                holds(self.member.pop(key, None) == prefix.id, "GONE for a stage of no pipeline, or twice")
                self.held.pop(key, None)
            elif prefix.kind == Kind.GONE:
                self.held.get(key, {}).pop((prefix.id, prefix.attempt), None)
            elif prefix.kind == Kind.STEP:
                holds(key in self.pipes.get(prefix.id, ()), "a STEP went to a stage of another pipeline")
        self.fresh = None
        self._unformed(core)
        self._settle(core, now)

    def together(self, one: bytes, other: bytes) -> bool:
        """Whether an answer of one peer counts for the other: the same, or stages of one pipeline."""
        return one == other or (one in self.member and self.member[one] == self.member.get(other))

    def executes(self, identity: bytes, worker: str) -> None:
        """A worker that is not idempotent begins with a request."""
        before = self.executed.setdefault(identity, worker)
        holds(before is worker, f"{identity.hex()[:6]} was executed by {before} and by {worker}")

    # -- inside

    def _requested(self, core: Core, now: float, asker: Peer, prefix: Prefix, frames: list[Any]) -> None:
        live = self.live.get(prefix.id)
        lost = 0
        if live is not None and prefix.attempt > live.attempt:
            self.attempts[prefix.id] = live.attempt
            live, lost = None, live.lost
        if live is None and prefix.attempt > self.attempts.get(prefix.id, -1):
            deadline = now + prefix.deadline / 1000 if prefix.deadline else float("inf")
            service, _, _, parent, *_ = routing_of(frames[0])
            if parent in self.live:
                deadline = min(deadline, self.live[parent].deadline)
            self.live[prefix.id] = Live(asker, prefix.attempt, deadline, service, lost=lost)
            self.fresh = (prefix.id, prefix.attempt)

    def _answered(self, now: float, key: bytes, prefix: Prefix, frames: list[Any]) -> None:
        live = self.live.get(prefix.id)
        name = f"{prefix.id.hex()[:6]}/{prefix.attempt}"
        holds(live is not None, f"{name} was answered twice, or never asked")
        assert live is not None
        holds(live.asker.key == key, f"the answer to {name} went to another peer")
        holds(live.attempt == prefix.attempt, f"{name} was answered, attempt {live.attempt} is under way")
        del self.live[prefix.id]
        code = decode(frames)[1].code if prefix.kind == Kind.ERROR else "final"
        holds(live.service != "echo" or code != "worker_lost", "could have been given to another worker", prefix.id)
        condemned = live.given and live.lost + 1 == self.tries
        holds(code != "poisoned" or condemned, f"was given up after {live.lost} losses", prefix.id)
        holds(code != "deadline" or now >= live.deadline - 1e-6, "was ended before its deadline", prefix.id)
        self.tally[code] = self.tally.get(code, 0) + 1
        if self.fresh != (prefix.id, prefix.attempt) or code not in AT_THE_DOOR:
            self.attempts[prefix.id] = prefix.attempt

    def _given(self, core: Core, key: bytes, prefix: Prefix) -> None:
        leg = (prefix.id, prefix.attempt)
        name = f"{prefix.id.hex()[:6]}, leg {prefix.attempt}"
        holds(leg not in self.legs, f"{name} was given out twice")
        holds(prefix.id in self.live, f"{name} was given out, and nobody waits for it")
        self.legs[leg] = key
        live = self.live[prefix.id]
        live.lost += live.given
        live.given = True
        holds(live.lost < self.tries, "was given to more workers than is allowed", prefix.id)
        self.held.setdefault(key, {})[leg] = None
        peer = core.roster.peers.get(key)
        if peer is not None:
            holds(not peer.draining, f"{name} was given to {peer.name}, which drains")
            count = len(self.held[key])
            if live.lost:
                self.suspects.add(leg)
            alone = count == 1 or not any(held in self.suspects for held in self.held[key])
            holds(alone, f"{name}: a suspect shares {peer.name} with another request")
            holds(count <= peer.hello.capacity, f"{peer.name} holds {count} requests, capacity {peer.hello.capacity}")

    def _formed(self, key: bytes, prefix: Prefix, place: int) -> None:
        stages = self.pipes.setdefault(prefix.id, [])
        holds(len(stages) == place, "FORM went out in the wrong order")
        holds(key not in self.member, "FORM for a stage that was not told that its pipeline is over")
        stages.append(key)
        self.member[key] = prefix.id

    def _unformed(self, core: Core) -> None:
        """A pipeline that has lost a stage, or told one that it is over, is over for all of them."""
        for key in [key for key in self.member if key not in core.roster.peers]:
            del self.member[key]
        for pipeline, stages in list(self.pipes.items()):
            left = [stage for stage in stages if self.member.get(stage) == pipeline]
            if len(left) < len(stages):
                holds(not left, "stages were not told that their pipeline is over")
                del self.pipes[pipeline]

    def _settle(self, core: Core, now: float) -> None:
        """What has no asker any more is forgotten; what is left must be what the core has open, and in time."""
        peers = core.roster.peers
        for key in [key for key in self.held if key not in peers]:
            del self.held[key]
        for identity, live in list(self.live.items()):
            if peers.get(live.asker.key) is not live.asker:
                self.attempts[identity] = max(live.attempt, self.attempts.get(identity, -1))
                del self.live[identity]
            else:
                record = core.requests.open.get(identity)
                there = record is not None and record.attempt == live.attempt
                holds(there, "was lost without a word", identity)
                holds(now <= live.deadline + SLACK, "is late", identity)
        holds(len(self.live) == len(core.requests.open), "the core has requests open that nobody asked")
        for key, held in self.held.items():
            peer = peers[key]
            right = len(held) == len(peer.serving) + len(peer.ending)
            right = right and all((record.id, record.leg) in held for record in peer.serving.values())
            holds(right and all(leg in held for leg in peer.ending), "holds other requests than are booked", peer)
