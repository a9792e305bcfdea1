"""The routing table: what each message and each moment means for the requests under way. Knows no socket and no clock.

How a request changes is in transitions.py.
"""

from collections.abc import Callable
from typing import Any

from ..schema.codec import decode, encode
from ..schema.errors import Malformed, Poisoned, RalmqError, Refused, RequestCancelled, WorkerFailed
from ..schema.frame import Prefix, restamped
from ..schema.limits import MAX_ACTIVE, MAX_ATTEMPT
from ..schema.message import Active, Credit, Error, Final, Gone, Kind, Release
from .causes import ORPHAN, busy, nobody, too_late
from .limits import RECORD, Limits
from .pipelines import PIPELINE, Pipelines
from .records import Frames, Peer, Record, Sent
from .routes import Route, Routes
from .services import Service
from .transitions import ENDED, NEVER, QUEUED, Transitions

ANY = 0x7FFF_FFFF  # credit without bound
SHARE = 15  # an asker may have so many requests in a queue for each place that is left for others
Builtin = Callable[[float, Peer, Prefix, dict[str, Any]], dict[str, Any] | None]  # None: it is answered later


class Requests(Transitions):
    """The routing table: id -> who asked, who serves, which leg, until when."""

    def __init__(self, out: list[Sent], pipelines: Pipelines, epoch: int, limits: Limits, now: float) -> None:
        super().__init__(out, pipelines, epoch, limits)
        self.builtins: dict[str, Builtin] = {}  # services that the broker answers itself
        self.memory = 0  # bytes of the broker's process, as it was told
        self._room = limits.peer_bytes  # of an asker; below 0 while the memory is full
        self._started = now
        self._routes = Routes()

    # -- from the asker

    def accept(
        self, now: float, asker: Peer, prefix: Prefix, frames: Frames, route: Route | None = None, losses: int = 0
    ) -> None:
        """REQUEST: dispatched at once where a worker has credit, else queued, else refused."""
        known = self.open.get(prefix.id)
        clean = False
        if known is not None:
            if not self._replaces(asker, prefix, known):
                return None
            losses, clean = known.losses, known.clean and known.state is QUEUED
            self._abandon(now, known)
        elif prefix.id[:8] in _RESERVED:
            return self._refuse(asker, prefix, Malformed(_TAKEN))
        leg = prefix.attempt
        ended = self._ended[0].get(prefix.id, self._ended[1].get(prefix.id, -1))
        if ended >= 0 and (leg := self._following(asker, prefix, ended)) < 0:
            return None
        route = route or self._routes.read(frames[0])
        deadline = now + prefix.deadline / 1000 if prefix.deadline else 0.0
        parent: Record | None = None
        if route.parent is not None:
            parent = self.open.get(route.parent)
            if parent is None or not serves(asker, parent):
                return self._refuse(asker, prefix, RequestCancelled(ORPHAN))
            if parent.deadline and not 0.0 < deadline <= parent.deadline:
                deadline, left = parent.deadline, max(1, int((parent.deadline - now) * 1000))
                frames = [restamped(frames[0], attempt=prefix.attempt, deadline=left), *frames[1:]]
        service = self.services.get(route.service)
        if service is None:
            if route.service in self.builtins:
                return self._own(now, asker, prefix, frames, route.service)
            service = self.service(route.service)
        size = RECORD + (len(frames[0]) if len(frames) == 1 else sum(map(len, frames)))
        record = Record(prefix.id, asker, service, prefix.attempt, deadline, route.priority, frames, now, size)
        record.leg, record.wait = leg, now + route.wait_ms / 1000  # also where it waits later: its worker may be lost
        if prefix.attempt:
            record.clean = clean
        worker = None
        if not (losses or service.queue.count or asker.held + size > self._room):
            worker = service.choose()
        if worker is None:
            record.losses, record.parent = losses, parent
            if (refusal := self._queue(now, record)) is not None:
                self._forget(now, service)
                return self._refuse(asker, prefix, refusal)
        self.counts["accepted"] += 1
        self.open[record.id] = record
        asker.asked[record.id] = record
        asker.held += size
        if deadline and deadline < self._due:
            self._due = deadline
        if parent is not None:
            record.parent = parent
            parent.children = parent.children or {}
            parent.children[record.id] = record
        if worker is not None:
            self._dispatch(now, record, worker)
        elif service.workers:
            self._share(now, service)
        return None

    def retry(self, now: float, asker: Peer, prefix: Prefix, identity: Any) -> None:
        """A request in quarantine is served again, for whoever asks for that; it stays a suspect.

        Raises:
            Refused: there is none of that id, or its contents were not kept.
        """
        entry, frames = self.quarantine.find(identity, prefix)
        route = self._routes.read(frames[0])
        self.accept(now, asker, prefix, frames, route._replace(parent=None), 1)
        if prefix.id not in self.open:
            return  # it was refused, and stays in the list
        self.counts["retried"] += 1
        self.quarantine.drop(entry)
        self.credit(asker, prefix, ANY)

    def cancel(self, now: float, asker: Peer, prefix: Prefix) -> None:
        """CANCEL from the asker; a request that has ended meanwhile is passed over."""
        record = self.open.get(prefix.id)
        if record is not None and record.asker is asker and prefix.attempt == record.attempt:
            self.fail(now, record, RequestCancelled("cancelled by the asker"))

    def credit(self, asker: Peer, prefix: Prefix, until: int) -> None:
        """CREDIT from the asker goes to the worker, or waits with the request; it never shrinks."""
        record = self.open.get(prefix.id)
        if record is None or record.asker is not asker or prefix.attempt != record.attempt or until <= record.until:
            return
        record.until = until
        if record.worker is not None:
            self._tell(record.worker, Credit(until), record.id, record.leg)

    # -- from the worker

    def partial(self, worker: Peer, prefix: Prefix, frames: Frames) -> None:
        """PARTIAL: forwarded untouched where the fence lets it pass; else the worker is told to stop."""
        record = self.open.get(prefix.id)
        if record is None or record.leg != prefix.attempt or not serves(worker, record):
            self._stale(worker, prefix)
        else:
            self._forward(record, prefix, frames)

    def finish(self, now: float, worker: Peer, prefix: Prefix, frames: Frames) -> None:
        """FINAL or ERROR: the end of the request, or the late acknowledgement of one that ended without the worker."""
        record = self.open.get(prefix.id)
        if record is None or record.leg != prefix.attempt or not serves(worker, record):
            owner = worker.owner
            if owner.ending.pop((prefix.id, prefix.attempt), None) is None:
                self.counts["fenced"] += 1
            else:
                self._spare(now, owner)
            return
        assert record.worker is not None
        owner = record.worker
        if prefix.kind == Kind.ERROR:
            frames = self._failed(now, record, prefix, frames)
        self._forward(record, prefix, frames)
        record.service.finished += 1
        self._end(now, record)
        self._spare(now, owner)

    def reconcile(self, now: float, worker: Peer, active: tuple[Active, ...], heard: int) -> None:
        """A BEAT says what a worker has in hand: more than the broker knows is ended there, less is lost.

        A long request may be under way to the worker for many BEATs: it is missing once the worker has heard a BEAT
        of the broker that was sent behind it.
        """
        for identity, attempt in active:
            record = self.open.get(identity)
            served = record is not None and record.leg == attempt and serves(worker, record)
            if not served and (identity, attempt) not in worker.owner.ending:
                self._tell(worker, Gone("this attempt is over"), identity, attempt)
        if len(active) == MAX_ACTIVE:  # the list is cut off there
            return
        listed = set(active)
        booked = [record for record in (*worker.serving.values(), *worker.ending.values()) if record.given < heard]
        absent = [(record.id, record.leg) for record in booked if (record.id, record.leg) not in listed]
        for identity, leg in absent:
            self.counts["unlisted"] += 1
            self._tell(worker, Gone("this attempt is over"), identity, leg)
            if worker.ending.pop((identity, leg), None) is None:  # one may end others, which are there from then on
                lost = worker.serving.pop(identity)
                self._bereave(now, lost, worker, "does not know this request any more", worker)
            self._spare(now, worker)

    # -- from the roster and the clock

    def withdrawn(self, now: float, service: Service) -> None:
        """The last offer of a service is gone: those who wait get the time in which it may come back."""
        service.gone_at = now
        for record in service.records():
            until = (record.deadline or NEVER) if record.attempt else now + self._limits.absence
            record.wait = max(record.wait, until)
            self._remind(record)

    def lose_worker(self, now: float, worker: Peer, reason: str, gone: Peer) -> None:
        """Requests of a lost worker go to another where that is harmless, and fail otherwise; nothing is sent to it.

        `gone` is the worker itself, or a stage of the pipeline that it leads.
        """
        while worker.serving:  # one may end others
            record = worker.serving.pop(next(iter(worker.serving)))
            self._bereave(now, record, worker, reason, gone)
        worker.ending.clear()
        worker.load = 0
        worker.alone = False
        worker.bound()
        for service in worker.services:
            self._share(now, service)

    def lose_asker(self, now: float, asker: Peer) -> None:
        """Nobody waits any more for what a lost peer asked."""
        while asker.asked:  # one may end others, where a worker asked on behalf of what it asked itself
            self._abandon(now, next(iter(asker.asked.values())))

    def tick(self, now: float) -> None:
        """What time demands: deadlines, and the end of waiting for a service that did not come.

        All open requests are looked at, but only when the earliest time that was named has passed: with deadlines of
        about the same length that is once in such a length, and a request that ends in time costs nothing here.
        """
        if now < self._due:
            return
        self._due = NEVER
        for record in list(self.open.values()):
            if record.state is ENDED:  # with one before it
                continue
            if record.deadline and record.deadline <= now:
                self.fail(now, record, too_late(record, self._pipelines))
            elif record.state is QUEUED and not record.service.offers and record.wait <= now:
                self.fail(now, record, nobody(record.service))
            else:
                self._remind(record)

    def measured(self, memory: int) -> None:
        """Bytes of the broker's process; above the watermark nothing new is taken."""
        self.memory = memory
        self._room = -1 if 0 < self._limits.memory < memory else self._limits.peer_bytes

    def measure(self, now: float, seconds: float) -> None:
        """Rates of the services, once an interval; names that nobody offers or waits for are forgotten."""
        for service in list(self.services.values()):
            service.measure(now, seconds)
            self._forget(now, service)

    # -- inside

    def _replaces(self, asker: Peer, prefix: Prefix, known: Record) -> bool:
        """Whether this takes the place of an open request: it is the same, sent again."""
        if known.asker is not asker:
            self._refuse(asker, prefix, Malformed(_TAKEN))
        elif prefix.attempt > known.attempt:
            return True
        else:
            self.counts["duplicates"] += 1
        return False

    def _following(self, asker: Peer, prefix: Prefix, ended: int) -> int:
        """The leg of a request whose id is known to have ended; below 0 where it is not taken up again."""
        if ended >> 32 != asker.user:
            self._refuse(asker, prefix, Malformed(_TAKEN))
            return -1
        ended &= 0xFFFF_FFFF
        if prefix.attempt <= ended >> 16:
            self.counts["duplicates"] += 1
            return -1
        leg = max(prefix.attempt, (ended & MAX_ATTEMPT) + 1)
        if leg > MAX_ATTEMPT:
            self._refuse(asker, prefix, Malformed("asked too often under one id: draw a new id"))
            return -1
        return leg

    def _own(self, now: float, asker: Peer, prefix: Prefix, frames: Frames, name: str) -> None:
        """A request to the broker itself."""
        try:
            if asker.entry is not None and not asker.entry.may_ask(name):
                text = f"the key {asker.entry.name} ({asker.entry.role}) may not ask {name}"
                raise Refused(f"{text}: use one of the role admin")
            answer = self.builtins[name](now, asker, prefix, decode(frames)[1].body)
        except RalmqError as error:
            self._refuse(asker, prefix, error)
        else:
            if answer is not None:
                self._tell(asker, Final(answer), prefix.id, prefix.attempt)

    def _queue(self, now: float, record: Record) -> RalmqError | None:
        """Puts a request into its service's queue; the error to refuse it with where it cannot wait there.

        What is sent again was taken once, so the length of the queue does not turn it away, and it takes nobody's place
        there: whoever says so could keep the others out. What is asked on behalf of a request under way helps that one
        to its end, so a full memory does not turn it away.
        """
        service, asker, limits = record.service, record.asker, self._limits
        until = 0.0
        if not service.offers:
            until = max(self._started + limits.grace, service.gone_at + limits.absence, record.wait)
            if record.attempt:
                until = record.deadline or NEVER
            if until <= now:
                return nobody(service)
        if self._room < 0 and record.parent is None:
            return busy(service, now, f"the broker's memory is full ({self.memory >> 20} MiB)")
        if asker.held and asker.held + record.size > limits.peer_bytes:
            return busy(service, now, f"{asker.held} bytes are held for {asker.name}")
        full = service.queue.fresh >= limits.queue and not record.attempt
        if full or self.queued_bytes + record.size > limits.queue_bytes:
            return busy(service, now, f"{service.waiting} requests wait for {service.name}")
        own = service.queue.of(asker.key)
        if own > SHARE * (limits.queue - service.queue.fresh) and limits.queue > SHARE and not record.attempt:
            return busy(service, now, f"{own} requests of {asker.name} wait for {service.name}; the rest is for others")
        if record.parent is None and not record.attempt and not service.in_time(now, record):
            return busy(service, now, f"{service.waiting} requests wait for {service.name}, too many for its deadline")
        record.wait = max(record.wait, until)
        self._enqueue(now, record)
        self._remind(record)
        return None

    def _forget(self, now: float, service: Service) -> None:
        if not service.offers and not service.waiting and now > service.gone_at + self._limits.absence:
            del self.services[service.name]

    def _abandon(self, now: float, record: Record) -> None:
        """Ends a request without a word to its asker."""
        self.counts["abandoned"] += 1
        self._stop(record, Release())
        self._end(now, record)

    def _failed(self, now: float, record: Record, prefix: Prefix, frames: Frames) -> Frames:
        """A worker says that a request failed; what it found to be poison is listed, without contents.

        One that cannot be read ends the request as well: the asker gets an ERROR that can.
        """
        try:
            error: Error = decode(frames)[1]
        except Malformed as cause:
            self.counts[cause.code] += 1
            text = f"a worker of {record.service.name} failed, and what it says cannot be read: {cause.message}"
            error = Error(WorkerFailed.code, text)
            return encode(error, id=prefix.id, attempt=prefix.attempt, epoch=self._epoch)
        if error.code == Poisoned.code:
            self.counts[error.code] += 1
            self.quarantine.add(now, record, error.message, [])
        return frames

    def _forward(self, record: Record, prefix: Prefix, frames: Frames) -> None:
        if prefix.attempt != record.attempt:
            frames = [restamped(frames[0], attempt=record.attempt, deadline=prefix.deadline), *frames[1:]]
        self._out.append((record.asker.key, frames))

    def _stale(self, worker: Peer, prefix: Prefix) -> None:
        self.counts["fenced"] += 1
        if (prefix.id, prefix.attempt) not in worker.owner.ending:
            self._tell(worker, Gone("this attempt is over"), prefix.id, prefix.attempt)

    def _refuse(self, asker: Peer, prefix: Prefix, error: RalmqError) -> None:
        """Answers a request that is not accepted; no state is kept."""
        self.counts[error.code] += 1
        after = int(error.retry_after * 1000)
        self._tell(asker, Error(error.code, error.message[:2000], after), prefix.id, prefix.attempt)


_RESERVED = {bytes(8), PIPELINE}  # ids that begin so stand for no request
_TAKEN = "the id of this request is in use: draw another"


def serves(peer: Peer, record: Record) -> bool:
    """The fence by peer: the worker itself, or any stage of the pipeline that the worker leads."""
    worker = record.worker
    return worker is not None and (worker is peer or (peer.pipeline is not None and worker.pipeline is peer.pipeline))
