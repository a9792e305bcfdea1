"""Model peers in plain Python: a link as client/ has it, clients, and workers of four services. No socket, no clock."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ralmq.schema.frame import Prefix, restamped
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import (
    Active,
    Beat,
    Bye,
    Cancel,
    Credit,
    Error,
    Final,
    Gone,
    Hello,
    Partial,
    Release,
    Request,
    Welcome,
)
from simulation.invariants import holds
from simulation.wire import Frames
from simulation.world import World

HELLO_AGAIN = 0.3
WINDOW = 3
Key = tuple[bytes, int]


@dataclass(slots=True, eq=False)
class Ask:
    """A request of a node, from its side."""

    id: bytes
    service: str
    frames: Frames
    mark: int
    parts: int
    deadline: float
    attempt: int = -1
    received: int = 0
    place: int = -1  # of the part that came last
    granted: int = WINDOW
    ended: str = ""
    poison: bool = False
    spoilt: bool = False  # a broken worker gave parts of it
    then: Callable[[str], None] | None = None


class Link:
    """HELLO until WELCOME, BEATs, resends after a loss, parts in order and each once: the rules of client/link.py."""

    real = False

    def __init__(self, world: World, name: str, *, services: tuple[str, ...] = (), **offer: Any) -> None:
        self.world = world
        self.encode, self.decode = world.wire.encode, world.wire.decode
        self.name = name
        self.hello = Hello(world.rng.randbytes(16), name, services=services, stall_ms=1500, **offer)
        self.known = False
        self.epoch = 0
        self.heard = 0  # the broker's last BEAT
        self.asked: dict[bytes, Ask] = {}
        self.left = False  # a drained worker: says nothing any more
        world.join(self)
        self._announce()
        self._beats()

    def send(self, message: Any, id: bytes = NO_ID, attempt: int = 0, sequence: int = 0, flags: int = 0) -> None:
        if self.known and not self.left:
            frames = self.encode(message, id=id, attempt=attempt, sequence=sequence, epoch=self.epoch, flags=flags)
            self.world.send(self, frames)

    def ask(
        self,
        service: str,
        *,
        parts: int = 0,
        deadline: float = 0.0,
        size: int = 0,
        poison: bool = False,
        then: Callable[[str], None] | None = None,
        **routing: Any,
    ) -> Ask:
        """Asks a service for an answer of some parts; the mark in the body must come back with each."""
        rng = self.world.rng
        mark = rng.getrandbits(48)
        body = {"mark": mark, "parts": parts, "service": service, "padding": "x" * size, "poison": poison}
        request = Request(service, window=WINDOW if parts else 0, body=body, **routing)
        until = self.world.now + deadline if deadline else 0.0
        ask = Ask(rng.randbytes(16), service, [], mark, parts, until, poison=poison, then=then)
        ask.frames = self.encode(request, id=ask.id)
        self.asked[ask.id] = ask
        self._resend(ask)
        return ask

    def receive(self, frames: Frames) -> None:
        prefix, message = self.decode(frames)
        if self.left:
            return
        kind = type(message)
        if kind is Welcome:
            if not self.known or prefix.epoch != self.epoch:
                self._welcomed(prefix.epoch)
        elif kind is Gone and prefix.id == NO_ID:
            if self.known:
                self.known = False
                self._announce()
        elif self.known and prefix.epoch == self.epoch:
            if kind is Partial or kind is Final or (kind is Error and prefix.id != NO_ID):
                self._answer(prefix, message)
            elif kind is Beat:
                self.heard = message.progress
            else:
                self.take(prefix, message)

    def cut(self) -> None:
        """It learns of a lost connection from the broker alone, when it speaks on the next one."""

    def end(self) -> None:
        """It is dead."""

    # -- what workers override

    def take(self, prefix: Prefix, message: Any) -> None:
        raise AssertionError(f"{self.name} got {message}")

    def void(self, anew: bool) -> None:
        """The broker has forgotten this peer; `anew`: it is another broker."""

    def beat(self) -> Beat:
        return Beat()

    # -- inside

    def _announce(self) -> None:
        if not self.known and not self.left:
            self.world.send(self, self.encode(self.hello))
            self.world.later(self, HELLO_AGAIN, self._announce)

    def _beats(self) -> None:
        self.send(replace(self.beat(), heard=self.heard))
        self.world.later(self, 0.5, self._beats)

    def _welcomed(self, epoch: int) -> None:
        anew = self.epoch not in (0, epoch)
        if self.epoch:
            self.void(anew)
        self.known, self.epoch, self.heard = True, epoch, 0
        for ask in self.asked.values():
            if not ask.ended:
                self._resend(ask)

    def _resend(self, ask: Ask) -> None:
        if self.known and not self.left:
            left = max(1, int((ask.deadline - self.world.now) * 1000)) if ask.deadline else 0
            ask.attempt += 1
            head = restamped(ask.frames[0], attempt=ask.attempt, deadline=left, epoch=self.epoch)
            self.world.send(self, [head, *ask.frames[1:]])
            if ask.granted > WINDOW:  # it begins again at 0, and parts that came already bring no new credit
                self.send(Credit(ask.granted), ask.id, ask.attempt)

    def _answer(self, prefix: Prefix, message: Partial | Final | Error) -> None:
        ask = self.asked.get(prefix.id)
        if ask is None:
            holds(False, f"{self.name} got an answer to what it never asked")
            return
        if ask.ended or prefix.attempt != ask.attempt:
            return
        if isinstance(message, Error):
            holds(message.code != "busy" or message.retry_after_ms > 0, "BUSY without a time to ask again", ask.id)
            self._end(ask, message.code)
        elif message.body.get("mark") != ask.mark:
            holds(False, f"{ask.service}: the answer belongs to another request", ask.id)
        elif isinstance(message, Final):
            ask.spoilt = ask.spoilt or ask.id in self.world.spoilt
            right = ask.received == message.body["parts"] == ask.parts
            holds(right or ask.spoilt, f"{ask.received} of {ask.parts} parts came", ask.id)
            self._end(ask, "final")
        elif prefix.sequence != message.body["place"]:
            holds(False, "parts in the wrong order", ask.id)
        else:
            self._part(ask, prefix.sequence)

    def _part(self, ask: Ask, place: int) -> None:
        """A part is passed over where it is here already: the request was served from its beginning again."""
        ask.spoilt = ask.spoilt or ask.id in self.world.spoilt
        again = place != ask.place + 1 and place
        if again and not ask.spoilt and not self.world.doubles:
            holds(False, f"part {place} came behind part {ask.place}", ask.id)
        ask.place = place
        if place < ask.received:
            return
        if place != ask.received and not ask.spoilt:
            holds(False, f"part {place} came after {ask.received} of them", ask.id)
        ask.received = place + 1
        if ask.granted - ask.received < 2:
            ask.granted = ask.received + WINDOW
            self.send(Credit(ask.granted), ask.id, ask.attempt)

    def _end(self, ask: Ask, how: str) -> None:
        ask.ended = how
        if ask.then is not None:
            ask.then(how)


@dataclass(slots=True, eq=False)
class Job:
    """A request in hand of a worker."""

    body: dict[str, Any]
    until: int
    sent: int = 0
    waiting: bool = False
    done: list[int] = field(default_factory=list)


class Worker(Link):
    """Serves echo (idempotent), once (not), or nested (asks echo or nested on behalf of its request, then answers).

    A stubborn one goes on with its requests after the broker has forgotten it, as far as the broker stays the same.
    """

    def __init__(self, world: World, name: str, service: str, capacity: int, idempotent: bool, pace: float) -> None:
        self.jobs: dict[Key, Job] = {}
        self.seen: set[Key] = set()
        self.service = service
        self.pace = pace
        self.hangs = False
        self.broken = ""  # how it gives wrong parts: doubled, missing or foreign ones
        self.stubborn = world.rng.random() < 0.3
        self.progress = 0
        super().__init__(world, name, services=(service,), capacity=capacity, idempotent=idempotent)

    def beat(self) -> Beat:
        self.progress += not self.hangs
        return Beat(self.progress, len(self.jobs), tuple(Active(*key) for key in list(self.jobs)[:128]))

    def drain(self) -> None:
        self.send(Bye())

    def drop(self) -> None:
        """Forgets a request without a word, as no worker should."""
        if self.jobs:
            self.jobs.pop(self.world.rng.choice(list(self.jobs)))

    def void(self, anew: bool) -> None:
        self.hangs = False
        if anew:
            self.seen.clear()
        if anew or not self.stubborn:
            self.jobs.clear()

    def take(self, prefix: Prefix, message: Any) -> None:
        key = (prefix.id, prefix.attempt)
        if isinstance(message, Request):
            self._accept(key, message)
        elif isinstance(message, Cancel | Release | Gone):
            if self.jobs.pop(key, None) is not None:
                self.send(Error("cancelled"), *key)
        elif isinstance(message, Credit):
            if (job := self.jobs.get(key)) is not None and message.until > job.until:
                job.until = message.until
                if job.waiting:
                    job.waiting = False
                    self._go_on(key, job)
        elif isinstance(message, Bye):
            holds(not self.jobs or self.stubborn, f"{self.name} was let go with {len(self.jobs)} requests in hand")
            self.left = True
        else:
            super().take(prefix, message)

    def _accept(self, key: Key, message: Request) -> None:
        holds(message.service == message.body["service"] == self.service, f"{self.name} got {message.service}")
        if key in self.seen:
            return  # a message that came twice
        self.seen.add(key)
        self.world.oracle.executes(key[0], self.name, not self.hello.idempotent)
        job = self.jobs[key] = Job(message.body, message.window)
        if self.service == "nested":
            inner = "nested" if self.world.rng.random() < 0.3 else "echo"
            deadline = self.world.rng.choice([0.0, 0.5, 9.0])
            self.ask(inner, parent=key[0], deadline=deadline, then=lambda how: self._asked(key, job, how))
        else:
            self._go_on(key, job)

    def _asked(self, key: Key, job: Job, how: str) -> None:
        if self.jobs.get(key) is job:
            if how == "final":
                self._go_on(key, job)
            else:
                del self.jobs[key]
                self.send(Error("worker_failed", f"what it asked ended with {how}"), *key)

    def _go_on(self, key: Key, job: Job) -> None:
        self.world.later(self, self.pace * self.world.rng.uniform(0.2, 2.0), lambda: self._work(key, job))

    def _work(self, key: Key, job: Job) -> None:
        if self.jobs.get(key) is not job:
            return
        if self.hangs:
            self.world.later(self, 0.5, lambda: self._work(key, job))
            return
        if job.body["poison"]:
            self.world.doom(self)
        elif job.sent == job.body["parts"]:
            del self.jobs[key]
            if self.world.rng.random() < 0.03:
                self.send(Error("worker_failed", "it could not"), *key)
            else:
                self.send(Final({"mark": job.body["mark"], "parts": job.sent}), *key)
        elif job.until and job.sent >= job.until:
            job.waiting = True
        else:
            self._give(key, Partial({"mark": job.body["mark"], "place": job.sent}), job.sent)
            job.sent += 1
            self._go_on(key, job)

    def _give(self, key: Key, part: Partial, place: int) -> None:
        """One part, or what a broken worker makes of it; its own request is spoilt, and no other may be."""
        if self.broken:
            self.world.spoilt.add(key[0])
        if self.broken == "foreign" and (other := self.world.foreign(self)) is not None:
            self.send(part, *other, sequence=place)
        if self.broken != "missing" or place % 2:
            self.send(part, *key, sequence=place)
        if self.broken == "doubled":
            self.send(part, *key, sequence=place)


class Client(Link):
    """Asks at random, gives up at random."""

    def __init__(self, world: World, name: str, pace: float, poison: float) -> None:
        self.pace = pace
        self.poison = poison  # share of the requests for echo that end their worker
        self.active = True
        super().__init__(world, name)
        world.later(self, world.rng.uniform(0, pace), self._go)

    def _go(self) -> None:
        if not self.active:
            return
        rng = self.world.rng
        for _ in range(rng.choice([1, 1, 1, 1, 10])):
            self._ask_something()
        self.world.later(self, self.pace * rng.uniform(0.2, 2.0), self._go)

    def _ask_something(self) -> None:
        rng = self.world.rng
        service = rng.choice(["echo", "echo", "once", "nested", "nobody", "ralmq.status"])
        deadline = (
            rng.choice([0.3, 1.0, 4.0, 4.0]) if service in ("nested", "nobody") else rng.choice([0, 0.3, 2.0, 4.0])
        )
        parts = rng.choice([0, 1, 7]) if service in ("echo", "once") else 0
        size = rng.choice([0, 0, 500, 9000])
        if service == "ralmq.status":
            self._ask_status()
            return
        wait = rng.choice([0, 0, 700])
        poison = service == "echo" and rng.random() < self.poison
        routing: dict[str, Any] = {"priority": rng.randrange(10), "wait_ms": wait}
        ask = self.ask(service, parts=parts, deadline=deadline, size=size, poison=poison, **routing)
        if rng.random() < 0.1:
            self.world.later(self, rng.choice([0.0, 0.1, 1.0]), lambda: self._cancel(ask))

    def _ask_status(self) -> None:
        """The broker answers it itself, at once; an answer lost with its connection is not asked again."""
        if self.known:
            ask = Ask(self.world.rng.randbytes(16), "ralmq.status", [], 0, 0, 0.0, attempt=0, ended="status")
            self.asked[ask.id] = ask
            self.send(Request("ralmq.status"), ask.id)

    def _cancel(self, ask: Ask) -> None:
        if not ask.ended:
            self._end(ask, "gave up")
            self.send(Cancel(), ask.id, max(0, ask.attempt))

    def leave(self) -> None:
        self.active = False
        self.send(Bye())
        self.left = True
