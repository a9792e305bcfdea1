"""What a right broker would do, kept in tables of its own: sees lost, doubled, crossed, late and excess messages."""

from dataclasses import dataclass
from typing import Any

from ralmq.broker.core import Core
from ralmq.broker.records import Peer
from ralmq.schema.codec import decode, routing_of
from ralmq.schema.frame import Prefix, read_prefix
from ralmq.schema.limits import NO_ID
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

    def __init__(self, tries: int, strict: bool = False) -> None:
        self.tries = tries
        self.strict = strict
        self.due = float("inf")  # no deadline ends before
        self.peers = 0  # of the core, when they were looked at last
        self.live: dict[bytes, Live] = {}
        self.attempts: dict[bytes, int] = {}  # the highest one that was ended or abandoned, in this epoch
        self.fresh: Leg | None = None  # the request whose arrival is being answered
        self.held: dict[bytes, dict[Leg, None]] = {}  # worker -> what it must still end
        self.legs: dict[Leg, bytes] = {}  # each leg that was ever given to a worker, in this epoch
        self.member: dict[bytes, bytes] = {}  # stage -> pipeline, as told by FORM
        self.pipes: dict[bytes, list[bytes]] = {}  # pipeline -> its stages, the leader first
        self.suspects: set[Leg] = set()  # legs of requests whose worker was lost before
        self.executed: dict[bytes, str] = {}  # requests of services that are not idempotent
        self.given: dict[bytes, int] = {}  # how often each request was given to a worker, by all brokers
        self.executions: dict[bytes, int] = {}  # how often each was begun by one
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
        roster = len(core.roster.peers) != self.peers
        for key, frames in sent:
            head = frames[0]
            kind = head[1]
            if kind == Kind.STEP:
                if key not in self.pipes.get(head[12:28], ()):
                    holds(False, "a STEP went to a stage of another pipeline")
            elif kind in _PASSED:
                continue
            elif kind in _ENDS:
                self._answered(now, key, read_prefix(head), frames)
            elif kind == Kind.REQUEST:
                self._given(core, key, read_prefix(head))
            elif kind == Kind.GONE:
                roster = self._gone(key, read_prefix(head)) or roster
            elif kind == Kind.FORM:
                self._formed(key, read_prefix(head), decode(frames)[1].place)
                roster = True
            else:
                roster = roster or kind in (Kind.WELCOME, Kind.BYE)
        if roster:
            self._unformed(core)
            self._forget(core)
        fresh, self.fresh = self.fresh, None
        if fresh is not None:
            live = self.live.get(fresh[0])
            if live is not None:
                self._open(core, fresh[0], live)
        if self.strict:
            self.settle(core, now)
        elif len(self.live) != len(core.requests.open):
            self.settle(core, now)
            holds(False, "the core has requests open that nobody asked")

    def together(self, one: bytes, other: bytes) -> bool:
        """Whether an answer of one peer counts for the other: the same, or stages of one pipeline."""
        return one == other or (one in self.member and self.member[one] == self.member.get(other))

    def executes(self, identity: bytes, worker: str, once: bool) -> None:
        """A worker begins with a request; `once`: of a service that is not idempotent."""
        count = self.executions[identity] = self.executions.get(identity, 0) + 1
        if count > self.given.get(identity, 0):
            holds(False, f"was executed {count} times, more often than it was given out", identity)
        if once:
            before = self.executed.setdefault(identity, worker)
            holds(before is worker and count == 1, f"was executed by {before} and by {worker}", identity)

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
            self.due = min(self.due, deadline + SLACK)
            self.live[prefix.id] = Live(asker, prefix.attempt, deadline, service, lost=lost)
            self.fresh = (prefix.id, prefix.attempt)

    def _answered(self, now: float, key: bytes, prefix: Prefix, frames: list[Any]) -> None:
        live = self.live.get(prefix.id)
        holds(live is not None, "was answered twice, or never asked", prefix.id)
        assert live is not None
        holds(live.asker.key == key, "the answer to it went to another peer", prefix.id)
        holds(live.attempt == prefix.attempt, "was answered, and another attempt is under way", prefix.id)
        del self.live[prefix.id]
        code = routing_of(frames[0])[0] if prefix.kind == Kind.ERROR else "final"
        holds(live.service != "echo" or code != "worker_lost", "could have been given to another worker", prefix.id)
        condemned = live.given and live.lost + 1 == self.tries
        own = live.service.startswith(("lm:", "generate:"))  # these may say so themselves
        holds(code != "poisoned" or condemned or own, "was given up too early", prefix.id)
        early = now < live.deadline - 1e-6 and not own  # an index may have been too slow for a text
        holds(code != "deadline" or not early, "was ended before its deadline", prefix.id)
        self.tally[code] = self.tally.get(code, 0) + 1
        if self.fresh != (prefix.id, prefix.attempt) or code not in AT_THE_DOOR:
            self.attempts[prefix.id] = prefix.attempt

    def _given(self, core: Core, key: bytes, prefix: Prefix) -> None:
        leg = (prefix.id, prefix.attempt)
        holds(leg not in self.legs, "was given out twice", prefix.id)
        holds(prefix.id in self.live, "was given out, and nobody waits for it", prefix.id)
        self.legs[leg] = key
        self.given[prefix.id] = self.given.get(prefix.id, 0) + 1
        live = self.live[prefix.id]
        live.lost += live.given
        live.given = True
        holds(live.lost < self.tries, "was given to more workers than is allowed", prefix.id)
        self.held.setdefault(key, {})[leg] = None
        peer = core.roster.peers.get(key)
        if peer is not None:
            holds(not peer.draining, "was given work while it drains", peer)
            count = len(self.held[key])
            if live.lost:
                self.suspects.add(leg)
            alone = count == 1 or not any(held in self.suspects for held in self.held[key])
            holds(alone, "a suspect shares it with another request", peer)
            holds(count <= peer.hello.capacity, "holds more requests than its capacity", peer)

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

    def late(self, now: float) -> None:
        """Looks whether something that must have ended by now is still there."""
        if now <= self.due:
            return
        self.due = min([live.deadline for live in self.live.values()], default=float("inf")) + SLACK
        for identity, live in self.live.items():
            holds(now <= live.deadline + SLACK, "is late", identity)

    def settle(self, core: Core, now: float) -> None:
        """What is left must be what the core has open, and in time; what workers hold, what is booked."""
        peers = core.roster.peers
        self._forget(core)
        for identity, live in self.live.items():
            self._open(core, identity, live)
            holds(now <= live.deadline + SLACK, "is late", identity)
        holds(len(self.live) == len(core.requests.open), "the core has requests open that nobody asked")
        for key, held in self.held.items():
            peer = peers[key]
            right = len(held) == len(peer.serving) + len(peer.ending)
            right = right and all((record.id, record.leg) in held for record in peer.serving.values())
            holds(right and all(leg in held for leg in peer.ending), "holds other requests than are booked", peer)

    def _open(self, core: Core, identity: bytes, live: Live) -> None:
        record = core.requests.open.get(identity)
        if record is None or record.attempt != live.attempt:
            holds(False, "was lost without a word", identity)

    def _gone(self, key: bytes, prefix: Prefix) -> bool:
        """GONE: of a pipeline, of an attempt, or of all; whether it changes who is there."""
        if prefix.id in self.pipes:
            holds(self.member.pop(key, None) == prefix.id, "GONE for a stage of no pipeline, or twice")
            self.held.pop(key, None)
            return True
        self.held.get(key, _NOTHING).pop((prefix.id, prefix.attempt), None)
        return prefix.id == NO_ID

    def _forget(self, core: Core) -> None:
        """What has no asker any more is forgotten, and so is what lost workers held."""
        peers = core.roster.peers
        self.peers = len(peers)
        for key in [key for key in self.held if key not in peers]:
            del self.held[key]
        for identity, live in list(self.live.items()):
            if peers.get(live.asker.key) is not live.asker:
                self.attempts[identity] = max(live.attempt, self.attempts.get(identity, -1))
                del self.live[identity]


_ENDS = (Kind.FINAL, Kind.ERROR)
_PASSED = (Kind.PARTIAL, Kind.CREDIT, Kind.BEAT, Kind.CANCEL, Kind.RELEASE)
_NOTHING: dict[Leg, None] = {}
