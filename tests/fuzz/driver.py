"""A broker's core among peers that may do anything, and a small oracle of its own. Knows no fuzzer.

Each act is one call of the core with plain arguments, small numbers that both fuzzers can choose; after each the state
is checked by `invariants` and what was sent by the oracle here: an accepted request ends exactly once toward its asker,
a leg is given out once, no answer reaches a stranger, and BUSY says when to come again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ralmq.broker.core import Core
from ralmq.broker.limits import Limits
from ralmq.broker.records import Record
from ralmq.schema.codec import decode, encode
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import RETURN, Prefix, read_prefix
from ralmq.schema.keys import Entry
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import (
    Active,
    Beat,
    Bye,
    Cancel,
    Credit,
    Error,
    Final,
    Hello,
    Kind,
    Partial,
    Request,
    Span,
    Step,
)
from simulation.invariants import holds, invariants, quiescent

Frames = list[Any]
Sent = list[tuple[bytes, Frames]]
End = tuple[bytes, bytes, int]  # who it went to, id, attempt
EPOCH = 7
TIGHT = Limits(
    queue=3, queue_bytes=30_000, peer_bytes=12_000, memory=1000, tries=3, quarantine=2, quarantine_bytes=3000, beat=0.5
)
PEERS = [b"p%d" % n for n in range(9)]
REQUESTS = 6  # under way at a time, by number
SERVICES = ["echo", "search:docs", "lm:m", "nowhere"]
OWN = ["ralmq.status", "ralmq.drain", "ralmq.quarantine.list", "ralmq.quarantine.retry", "ralmq.unknown"]
SPANS = [(0, 2, 2), (0, 1, 2), (1, 2, 2), (0, 1, 3), (1, 2, 3), (2, 3, 3), (1, 3, 3)]
ATTEMPTS = [0, 1, 2, 3, 65534, 65535]
SPAN_OF = {4: 1, 5: 2, 8: 0}
USUAL = [0, 1, 2, 3, 1, 1, 0, 1, 1]  # key of each peer, where none was given
ENTRIES = [
    Entry("client", "client", "c" * 40),
    Entry("worker", "worker", "w" * 40),
    Entry("echo", "worker", "e" * 40, ("echo",)),
    Entry("admin", "admin", "a" * 40),
]
ANSWERS = {Kind.PARTIAL, Kind.FINAL, Kind.ERROR}


class Driver:
    """One core; `keys` says that it lets only keys in, so that each connection is introduced first."""

    def __init__(self, *, keys: bool = False) -> None:
        self.now = 1000.0
        self.keys = keys
        self.core = Core(EPOCH, self.now, TIGHT)
        self.ids = [b"request %07d." % n for n in range(REQUESTS)]
        self._drawn = REQUESTS
        self.accepted: set[tuple[bytes, int]] = set()  # id and attempt of all that were ever taken
        self.legs: set[tuple[bytes, int]] = set()  # id and leg of all that was ever given to a worker
        self.seen: Counter[str] = Counter()  # what happened, so that a run can say what it has tried

    # -- peers

    def hello(self, peer: int, nonce: int, services: Sequence[int] = (), span: int = -1, **offer: Any) -> None:
        """A client where nothing is offered; nonces are few, so that peers meet under one."""
        model = Span("m", "f", *SPANS[span % len(SPANS)], 16, 4, 64) if span >= 0 else None
        names = tuple(dict.fromkeys(SERVICES[n % len(SERVICES)] for n in services))
        hello = Hello(b"nonce %d" % (nonce % 8) + bytes(9), f"peer-{peer % 9}", services=names, span=model, **offer)
        self.say(peer, hello, epoch=0)

    def ready(self, peer: int) -> None:
        """What a link does after GONE: HELLO again, with the usual offer. 0, 3 and 6 are clients, 4, 5 and 8 stages."""
        peer %= 9
        if PEERS[peer] in self.core.roster.peers:
            return
        if peer % 3 == 0:
            self.hello(peer, peer)
        elif peer in SPAN_OF:
            self.hello(peer, peer, span=SPAN_OF[peer], capacity=2, stall_ms=1500)
        else:
            self.hello(peer, peer, [0, peer % 2], capacity=1 + peer % 2, idempotent=peer < 7)

    def introduce(self, peer: int, entry: int) -> None:
        """A new connection under this routing id, with a key."""
        if self.keys:
            self._introduce(PEERS[peer % 9], ENTRIES[entry % len(ENTRIES)])

    def bye(self, peer: int) -> None:
        self.say(peer, Bye())

    def lost(self, peer: int) -> None:
        key = PEERS[peer % 9]
        self._act(lambda: self.core.lost(self.now, key), key)

    def beat(self, peer: int, progress: int, busy: int, active: Sequence[tuple[int, int]] | None) -> None:
        """`active`: ids and legs; None lists what the peer has in hand."""
        if active is None:
            listed = [Active(*key) for key in self.hand(peer)]
        else:
            listed = [Active(self.ids[n % REQUESTS], leg & 0xFFFF) for n, leg in active]
        self.say(peer, Beat(progress, busy, tuple(listed[:128]), heard=self.core.requests.beats))

    # -- requests

    def ask(
        self, peer: int, request: int, service: int, attempt: int = 0, deadline: int = 0, size: int = 0, **more: Any
    ) -> None:
        """`deadline` in ms, `size` in bytes of the body, `parent` a number like `request`; `fresh` draws a new id."""
        if more.pop("fresh", False):
            self._drawn += 1
            self.ids[request % REQUESTS] = b"request %07d." % self._drawn
        parent = more.pop("parent", None)
        name = SERVICES[service % len(SERVICES)]
        body = {"x": "x" * size}
        message = Request(name, parent=None if parent is None else self.ids[parent % REQUESTS], body=body, **more)
        self.say(peer, message, request, attempt=ATTEMPTS[attempt % len(ATTEMPTS)], deadline=deadline)

    def operate(self, peer: int, request: int, service: int, argument: int, attempt: int = 0) -> None:
        """A service of the broker itself; its status has to be told to whoever may ask."""
        named = self.ids[argument % REQUESTS].hex() if service % len(OWN) == 3 else f"peer-{argument % 9}"
        body = {"worker": named, "id": named}
        self.say(peer, Request(OWN[service % len(OWN)], body=body), request, attempt=attempt & 0xFFFF)

    def cancel(self, peer: int, request: int, attempt: int) -> None:
        self.say(peer, Cancel("enough"), request, attempt=self._attempt(request, attempt))

    def credit(self, peer: int, request: int, attempt: int, until: int) -> None:
        self.say(peer, Credit(until), request, attempt=self._attempt(request, attempt))

    def answer(self, peer: int, which: int, how: int) -> None:
        """An honest part or end of something that the peer has in hand."""
        hand = self.hand(peer)
        if hand:
            identity, leg = hand[which % len(hand)]
            self.say(peer, ENDS[how % len(ENDS)], identity, attempt=leg)

    def hand(self, peer: int) -> list[tuple[bytes, int]]:
        """Ids and legs of what the peer, or the leader of its pipeline, has in hand."""
        known = self.core.roster.peers.get(PEERS[peer % 9])
        if known is None:
            return []
        return [*((record.id, record.leg) for record in known.owner.serving.values()), *known.owner.ending]

    def claim(self, peer: int, request: int, leg: int, how: int) -> None:
        """An answer from whoever likes, under any leg."""
        self.say(peer, ENDS[how % len(ENDS)], request, attempt=leg & 0xFFFF)

    def hop(self, peer: int, back: bool, honest: bool) -> None:
        """A STEP under the peer's own pipeline, or another one."""
        known = self.core.roster.peers.get(PEERS[peer % 9])
        formed = list(self.core.pipelines.formed)
        own = known.pipeline.id if known is not None and known.pipeline is not None else NO_ID
        identity = own if honest or not formed else formed[-1]
        self.say(peer, Step(), identity, flags=RETURN if back else 0)

    # -- the world

    def raw(self, peer: int, frames: Frames) -> None:
        """Whatever comes from a socket: at least one frame."""
        self._step(peer, frames or [b""])

    def stale(self, peer: int, request: int) -> None:
        """A message of an earlier incarnation of the broker."""
        self.say(peer, Request("echo"), request, epoch=EPOCH - 1)

    def wait(self, ms: int) -> None:
        """Time passes, then the core is asked what it demands."""
        self.now += ms / 1000
        self._act(lambda: self.core.tick(self.now))

    def memory(self, full: bool) -> None:
        self.core.measured(TIGHT.memory + 1 if full else 10)

    def status(self) -> None:
        """It can be told, whatever peers say of themselves."""
        told = decode(encode(Final(self.core.status(self.now))))[1].body
        holds(told["broker"]["open_requests"] == len(self.core.requests.open), "the status miscounts")

    def close(self) -> None:
        """All leave: nothing may be left of them."""
        for peer in range(len(PEERS)):
            self.lost(peer)
        for _ in range(int(TIGHT.absence) + 1):
            self.wait(1000)
        quiescent(self.core)
        holds(not self.core.roster.peers and not self.core.roster.entries, "peers were left")
        holds(not self.core.pipelines.stages(), "stages were left")

    # -- inside

    def _introduce(self, key: bytes, entry: Entry) -> None:
        self._act(lambda: self.core.introduce(self.now, key, entry), key)

    def _attempt(self, request: int, attempt: int) -> int:
        """That of the open request of this number, mostly."""
        record = self.core.requests.open.get(self.ids[request % REQUESTS])
        return ATTEMPTS[attempt % len(ATTEMPTS)] if record is None or attempt & 8 else record.attempt

    def say(self, peer: int, message: Any, request: int | bytes = NO_ID, **prefix: Any) -> None:
        identity = self.ids[request % REQUESTS] if isinstance(request, int) else request
        self._step(peer, encode(message, id=identity, **{"epoch": EPOCH, **prefix}))

    def _step(self, peer: int, frames: Frames) -> None:
        key = PEERS[peer % 9]
        if self.keys and key not in self.core.roster.entries:
            self._introduce(key, ENTRIES[USUAL[peer % 9]])
        self._act(lambda: self.core.step(self.now, key, frames), key, frames)

    def _act(self, call: Callable[[], Sent], speaker: bytes = b"", frames: Frames | None = None) -> None:
        """One call of the core, and all that must hold after it."""
        before = Before(self.core)
        sent = call()
        invariants(self.core)
        try:
            arrived = read_prefix(frames[0]) if frames else None
        except Malformed:
            arrived = None
        ends: Counter[End] = Counter()
        for key, out in sent:
            there = key == speaker or key in before.peers or key in self.core.roster.peers
            holds(there, "something was sent to a stranger", key)
            prefix = read_prefix(out[0])
            self.seen[f"sends {prefix.kind}"] += 1
            if prefix.kind == Kind.REQUEST:
                self._given(key, prefix)
            elif prefix.kind in ANSWERS:
                if not self._refusal(key == speaker, before, arrived, prefix, out):
                    self._answered(before, speaker, arrived, key, prefix)
                    ends.update([(key, prefix.id, prefix.attempt)] * (prefix.kind != Kind.PARTIAL))
            elif prefix.kind != Kind.STEP:
                decode(out)  # what the core makes itself
        self._ended(before, arrived, speaker, ends)
        self._taken(before, arrived)

    def _refusal(self, to_speaker: bool, before: "Before", arrived: Prefix | None, prefix: Prefix, out: Frames) -> bool:
        """Whether this is no answer to a request, but says that the message just sent was none, or not allowed."""
        if prefix.kind != Kind.ERROR:
            return False
        error = decode(out)[1]  # also what a worker says must be understood by its asker
        self.seen[error.code] += 1
        holds(error.code != "busy" or error.retry_after_ms > 0, "BUSY without a time to come again", prefix.id)
        if not to_speaker or error.code not in {"malformed", "refused"}:
            return False
        if arrived is None or arrived.kind != Kind.REQUEST:
            return True
        record = before.open.get(prefix.id)  # one that is under way stays so
        return record is not None and self.core.requests.open.get(prefix.id) is record

    def _given(self, key: bytes, prefix: Prefix) -> None:
        leg = (prefix.id, prefix.attempt)
        holds(leg not in self.legs, f"leg {prefix.attempt} was given out twice", prefix.id)
        self.legs.add(leg)
        peer = self.core.roster.peers.get(key)
        holds(peer is None or peer.works, "was given to a peer that is no worker", prefix.id)

    def _answered(self, before: "Before", speaker: bytes, arrived: Prefix | None, key: bytes, prefix: Prefix) -> None:
        """An answer goes to who asked for it, and comes from who serves it or from the broker."""
        asked = before.asked.get(prefix.id) == (key, prefix.attempt)
        fresh = key == speaker and arrived is not None and arrived.kind == Kind.REQUEST
        fresh = fresh and (arrived.id, arrived.attempt) == (prefix.id, prefix.attempt)  # type: ignore[union-attr]
        holds(asked or fresh, "was answered to a peer that did not ask for it", prefix.id)
        if prefix.kind == Kind.PARTIAL or (prefix.kind == Kind.FINAL and not fresh):
            holds(
                speaker in before.serving.get(prefix.id, ()), "was answered by a peer that does not serve it", prefix.id
            )

    def _ended(self, before: "Before", arrived: Prefix | None, speaker: bytes, ends: "Counter[End]") -> None:
        """What is over has ended once, but for an asker that is gone or asked again under another attempt."""
        after = self.core.requests.open
        for (key, identity, attempt), count in ends.items():
            holds(count <= 1, "was ended twice", identity)
            record = after.get(identity)
            holds(
                record is None or (record.asker.key, record.attempt) != (key, attempt), "ended, and goes on", identity
            )
        for identity, record in before.open.items():
            if after.get(identity) is record:
                continue
            key, attempt = before.asked[identity]
            again = arrived is not None and arrived.kind == Kind.REQUEST and key == speaker
            again = again and arrived.id == identity and arrived.attempt > attempt  # type: ignore[union-attr]
            here = self.core.roster.peers.get(key) is record.asker and not again
            holds(bool(ends[key, identity, attempt]) or not here, "ended without a word", identity)
            self.seen["ended"] += here

    def _taken(self, before: "Before", arrived: Prefix | None) -> None:
        """An attempt that was taken once is not taken again."""
        if self.core.requests.counts["accepted"] > before.accepted and arrived is not None:
            taken = (arrived.id, arrived.attempt)
            holds(taken not in self.accepted, f"attempt {arrived.attempt} was taken twice", arrived.id)
            self.accepted.add(taken)
            self.seen["accepted"] += 1


class Before:
    """What the core has open before a call, who asked it, who may answer it, and who is there."""

    def __init__(self, core: Core) -> None:
        self.open: dict[bytes, Record] = dict(core.requests.open)
        self.asked = {identity: (record.asker.key, record.attempt) for identity, record in self.open.items()}
        self.serving = {identity: _servers(record) for identity, record in self.open.items()}
        self.peers = set(core.roster.peers)
        self.accepted = core.requests.counts["accepted"]


def _servers(record: Record) -> set[bytes]:
    worker = record.worker
    if worker is None:
        return set()
    return {stage.key for stage in worker.pipeline.stages} if worker.pipeline is not None else {worker.key}


ENDS: list[Any] = [
    Partial(),
    Final({"n": 1}),
    Error("worker_failed", "no"),
    Error("poisoned", "three were lost"),
    Error("of_a_later_version"),
]
