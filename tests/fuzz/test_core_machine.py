"""The broker's core as a state machine: any act of any peer at any time, hostile ones too; checked after each."""

from collections import Counter
from typing import Any, ClassVar

from fuzz.driver import EPOCH, SPAN_OF, Driver
from fuzz.messages import KIND_OF, TIMES, Frames, examples, facts, messages, mutated
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from ralmq.schema.codec import encode
from ralmq.schema.errors import Malformed
from ralmq.schema.message import KINDS, Error, Final, Kind, Partial

peers = st.integers(0, 8)
CLIENTS = (0, 3, 6)
clients = st.sampled_from(CLIENTS)
requests = st.integers(0, 5)
attempts = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4, 5])
waits = st.sampled_from([0, 5, 10, 100, 500, 500, 1000, 1600, 5000])


answers = st.one_of(*(KIND_OF[cls] for cls in (Error, Error, Partial, Final)))


def _frames(message: Any, identity: bytes, attempt: int) -> Frames:
    """None where the fields are together more than a section holds."""
    try:
        return [bytes(frame) for frame in encode(message, id=identity, attempt=attempt, epoch=EPOCH)]
    except Malformed:
        return []


class Machine(RuleBasedStateMachine):
    """Rules only; what must hold is in the driver."""

    seen: ClassVar[Counter[str]] = Counter()
    runs = 0

    @initialize(keys=st.booleans(), ready=st.booleans())
    def start(self, keys: bool, ready: bool) -> None:
        self.driver = Driver(keys=keys)
        if ready:  # a client, two workers and a pipeline: where most runs would come to much later
            for peer in range(7):
                self.driver.ready(peer)

    @rule(
        peer=peers,
        nonce=st.none() | st.integers(0, 7),
        capacity=st.integers(0, 3),
        idempotent=st.booleans(),
        stall_ms=st.sampled_from([500, 30_000]),
        labels=facts,
    )
    def join(self, peer: int, nonce: int | None, **offer: Any) -> None:
        """The lower numbers are clients, then come workers, then stages; some take the nonce of another."""
        own = peer if nonce is None else nonce
        if peer in CLIENTS:
            self.driver.hello(peer, own)
        elif peer in SPAN_OF:
            self.driver.hello(peer, own, span=SPAN_OF[peer], **{**offer, "idempotent": False})
        else:
            self.driver.hello(peer, own, [0, peer % 2], **offer)

    @rule(
        peer=peers, nonce=st.integers(0, 7), services=st.lists(st.integers(0, 2), max_size=3), span=st.integers(-1, 6)
    )
    def join_as_another(self, peer: int, nonce: int, services: list[int], span: int) -> None:
        self.driver.hello(peer, nonce, services, span, capacity=1)

    @rule(peer=peers, how=st.integers(0, 5))
    def leave(self, peer: int, how: int) -> None:
        if how == 0:
            self.driver.lost(peer)
        elif how == 1:
            self.driver.stale(peer, peer)
        elif how == 2:
            self.driver.introduce(peer, peer + 1)
        else:
            self.driver.bye(peer)

    @rule(asked=st.lists(st.tuples(clients, requests, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
    def ask_anew(self, asked: list[tuple[int, int, int, int]]) -> None:
        for peer, request, service, deadline in asked:
            self.driver.ready(peer)
            self.driver.ask(peer, request, service, deadline=deadline * 300, priority=4 + request, fresh=True)

    @rule(
        peer=peers,
        request=requests,
        service=st.integers(0, 3),
        attempt=attempts,
        deadline=st.sampled_from([0, 0, 5, 700, 60_000]),
        priority=st.integers(0, 9),
        window=st.sampled_from([0, 4]),
        parent=st.none() | requests,
        wait_ms=st.sampled_from([0, 0, 400, 3000]),
        size=st.sampled_from([0, 0, 0, 3000, 9000]),
    )
    def ask(self, **asked: Any) -> None:
        self.driver.ask(**asked)

    @rule(peer=peers, request=requests, service=st.integers(0, 4), argument=st.integers(0, 8), attempt=attempts)
    def operate(self, **asked: int) -> None:
        self.driver.operate(**asked)

    @rule(peer=peers, which=st.integers(0, 3), how=st.integers(0, 4))
    def answer(self, peer: int, which: int, how: int) -> None:
        self.driver.answer(peer, which, how)

    @rule(which=st.integers(0, 3), times=st.integers(1, 5))
    def serve(self, which: int, times: int) -> None:
        """Each worker ends something, if it has anything."""
        for peer in range(1, 9):
            self.driver.ready(peer)
            self.driver.answer(peer, which, times % 2)

    @rule(peer=peers, request=requests, leg=st.integers(0, 4), how=st.integers(0, 4))
    def claim(self, peer: int, request: int, leg: int, how: int) -> None:
        self.driver.claim(peer, request, leg, how)

    @rule(peer=peers, back=st.booleans(), honest=st.booleans())
    def hop(self, peer: int, back: bool, honest: bool) -> None:
        self.driver.hop(peer, back, honest)

    @rule(peer=peers, request=requests, attempt=st.integers(0, 15))
    def cancel(self, peer: int, request: int, attempt: int) -> None:
        self.driver.cancel(peer, request, attempt)

    @rule(peer=peers, request=requests, attempt=st.integers(0, 15), until=st.integers(0, 100))
    def credit(self, peer: int, request: int, attempt: int, until: int) -> None:
        self.driver.credit(peer, request, attempt, until)

    @rule(
        peer=peers,
        progress=st.integers(0, 3),
        busy=st.integers(0, 1),
        active=st.none() | st.lists(st.tuples(requests, st.integers(0, 4)), max_size=3),
    )
    def beat(self, peer: int, progress: int, busy: int, active: list[tuple[int, int]] | None) -> None:
        self.driver.beat(peer, progress, busy, active)

    @rule(ms=waits)
    def wait(self, ms: int) -> None:
        self.driver.wait(ms)

    @rule(full=st.booleans())
    def memory(self, full: bool) -> None:
        self.driver.memory(full)

    @rule()
    def status(self) -> None:
        self.driver.status()

    @rule(peer=peers, frames=st.lists(st.binary(max_size=60), min_size=1, max_size=3))
    def noise(self, peer: int, frames: list[bytes]) -> None:
        self.driver.raw(peer, frames)

    @rule(peer=peers, message=messages, request=requests, attempt=attempts)
    def unasked(self, peer: int, message: Any, request: int, attempt: int) -> None:
        """A sound message of any kind, under the id of a request that may be under way."""
        if frames := _frames(message, self.driver.ids[request], attempt):
            self.driver.raw(peer, frames)

    @rule(peer=st.integers(1, 8), data=st.data())
    def garbage(self, peer: int, data: st.DataObject) -> None:
        """A spoilt answer to what the peer has in hand, or any other spoilt message."""
        hand = self.driver.hand(peer)
        identity, leg = hand[0] if hand else (self.driver.ids[0], 0)
        if frames := _frames(data.draw(answers if hand else messages), identity, leg):
            self.driver.raw(peer, data.draw(mutated(frames)))

    def teardown(self) -> None:
        Machine.runs += 1
        if hasattr(self, "driver"):
            self.driver.close()
            Machine.seen += self.driver.seen


WANTED: dict[str, str] = {code: code for code in ("accepted", "ended", "busy", "no_service", "malformed", "deadline")}
WANTED |= {"cancelled": "cancelled", "worker_lost": "worker_lost"}
for kind in (Kind.WELCOME, Kind.GONE, Kind.REQUEST, Kind.FINAL, Kind.CANCEL, Kind.FORM, Kind.RELEASE):
    WANTED[f"sends {kind}"] = KINDS[kind].__name__


def test_a_core_keeps_its_promises_whatever_its_peers_do() -> None:
    """Which examples are drawn depends on the constants of all modules loaded: it goes on until all was seen."""
    drawn = examples(90, stateful_step_count=50, suppress_health_check=list(HealthCheck))
    for number in range(8):
        if TIMES == 1:
            seed(number)(Machine)
        run_state_machine_as_test(Machine, settings=settings(drawn, derandomize=False))  # type: ignore[no-untyped-call]
        if not (unseen := {name for what, name in WANTED.items() if Machine.seen[what] <= 5}):
            break
    assert not unseen, (unseen, Machine.seen)
