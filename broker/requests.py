"""The life of a request: every transition of a Record happens here and nowhere else. Knows no socket and no clock.

The rule on top: each accepted request ends in exactly one FINAL or ERROR to its asker, a worker's credit is spent
from dispatch until that worker is done with the request (or is lost), and an answer counts only if it comes from
the peer that serves the request now, under the current leg.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from ..schema.codec import encode
from ..schema.errors import Busy, DeadlineExceeded, Malformed, NoService, RalmqError, RequestCancelled, WorkerLost
from ..schema.frame import Prefix, restamped
from ..schema.limits import MAX_ATTEMPT
from ..schema.message import Cancel, Credit, Error, Final, Gone, Release
from .limits import Limits
from .pipelines import Pipelines
from .records import Frames, Peer, Record, Sent, State
from .routes import Routes
from .services import Service

QUEUED, RUNNING, ENDED = State  # by name: looking a member up in its class costs more than the comparison
NEVER = float("inf")
REMEMBERED = 16_384  # ended requests, twice: a duplicate that comes later than that is served again


class Requests:
    """The routing table: id -> who asked, who serves, which leg, until when."""

    def __init__(self, out: list[Sent], pipelines: Pipelines, epoch: int, limits: Limits, now: float) -> None:
        self.open: dict[bytes, Record] = {}
        self.services: dict[str, Service] = {}
        self.builtins: dict[str, Callable[[float], dict[str, Any]]] = {}  # services that the broker answers itself
        self.counts: Counter[str] = Counter()
        self.left: list[Peer] = []  # leaving workers whose last request has just ended
        self.queued_bytes = 0
        self._out = out
        self._pipelines = pipelines
        self._epoch = epoch
        self._limits = limits
        self._started = now
        self._due = NEVER  # no deadline and no wait ends before
        self._ended: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        self._routes = Routes()

    # -- from the asker

    def accept(self, now: float, asker: Peer, prefix: Prefix, frames: Frames) -> None:
        """REQUEST: dispatched at once where a worker has credit, else queued, else refused."""
        known = self.open.get(prefix.id)
        if known is not None:
            if known.asker is not asker:
                return self._refuse(asker, prefix, Malformed("the id of this request is in use: draw another"))
            if prefix.attempt <= known.attempt:
                self.counts["duplicates"] += 1
                return None
            self._abandon(now, known)
        leg = prefix.attempt
        ended = self._ended[0].get(prefix.id, -1)
        if ended < 0:
            ended = self._ended[1].get(prefix.id, -1)
        if ended >= 0:
            if leg <= ended >> 16:
                self.counts["duplicates"] += 1
                return None
            leg = max(leg, (ended & MAX_ATTEMPT) + 1)
            if leg > MAX_ATTEMPT:
                return self._refuse(asker, prefix, Malformed("asked too often under one id: draw a new id"))
        route = self._routes.read(frames[0])
        deadline = now + prefix.deadline / 1000 if prefix.deadline else 0.0
        parent: Record | None = None
        if route.parent is not None:
            parent = self.open.get(route.parent)
            if parent is None or not serves(asker, parent):
                return self._refuse(asker, prefix, RequestCancelled(_ORPHAN))
            if parent.deadline and not 0.0 < deadline <= parent.deadline:
                deadline = parent.deadline
                left = max(1, int((deadline - now) * 1000))
                frames = [restamped(frames[0], attempt=prefix.attempt, deadline=left), *frames[1:]]
        service = self.services.get(route.service)
        if service is None:
            if route.service in self.builtins:
                body = self.builtins[route.service](now)
                return self._tell(asker, Final(body), prefix.id, prefix.attempt)
            service = self.service(route.service)
        record = Record(prefix.id, asker, service, prefix.attempt, deadline, route.priority, frames, now)
        record.leg = leg
        if route.wait_ms:
            record.wait = now + route.wait_ms / 1000
        worker = service.choose() if not service.queue.count else None
        if worker is None and (refusal := self._queue(now, record, route.wait_ms)) is not None:
            self._forget(now, service)
            return self._refuse(asker, prefix, refusal)
        self.counts["accepted"] += 1
        self.open[record.id] = record
        asker.asked[record.id] = record
        if deadline and deadline < self._due:
            self._due = deadline
        if parent is not None:
            record.parent = parent
            parent.children = parent.children or {}
            parent.children[record.id] = record
        if worker is not None:
            self._dispatch(now, record, worker)
        return None

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
        self._forward(record, prefix, frames)
        record.service.finished += 1
        self._end(now, record)
        self._spare(now, owner)

    def reconcile(self, worker: Peer, active: tuple[tuple[bytes, int], ...]) -> None:
        """Attempts that a worker's BEAT lists and that nobody waits for are ended there."""
        for identity, attempt in active:
            record = self.open.get(identity)
            served = record is not None and record.leg == attempt and serves(worker, record)
            if not served and (identity, attempt) not in worker.owner.ending:
                self._tell(worker, Gone("this attempt is over"), identity, attempt)

    # -- from the roster and the clock

    def service(self, name: str) -> Service:
        """The service of that name, made where it is new."""
        return self.services.setdefault(name, Service(name))

    def feed(self, now: float, worker: Peer) -> None:
        """Gives a worker with credit what waits for its services."""
        for service in worker.services:
            while service.queue.count and worker.load < worker.capacity and worker in service.workers:
                self._next(now, service, worker)

    def withdrawn(self, now: float, service: Service) -> None:
        """The last offer of a service is gone: those who wait get the grace in which it may come back."""
        service.gone_at = now
        for record in service.queue.records():
            until = (record.deadline or NEVER) if record.attempt else now + self._limits.grace
            record.wait = max(record.wait, until)
            self._remind(record)

    def lose_worker(self, now: float, worker: Peer, reason: str) -> None:
        """Requests of a lost worker go to another where that is harmless, and fail otherwise; nothing is sent to it."""
        while worker.serving:
            _, record = worker.serving.popitem()  # the youngest first: each goes to the head of the queue
            record.worker = None
            if worker.hello.idempotent and record.tries < self._limits.tries and record.leg < MAX_ATTEMPT:
                self._requeue(now, record)
            else:
                self.fail(now, record, WorkerLost(f"worker {worker.name} of {record.service.name} {reason}: ask again"))
        worker.ending.clear()
        worker.load = 0
        for service in worker.services:
            while service.queue.count and (other := service.choose()) is not None:
                self._next(now, service, other)

    def lose_asker(self, now: float, asker: Peer) -> None:
        """Nobody waits any more for what a lost peer asked."""
        while asker.asked:  # one may end others, where a worker asked on behalf of what it asked itself
            self._abandon(now, next(iter(asker.asked.values())))

    def fail(self, now: float, record: Record, error: RalmqError) -> None:
        """Ends a request with an ERROR to its asker; a worker that serves it is told to stop."""
        self.counts[error.code] += 1
        self._tell(record.asker, Error(error.code, error.message[:2000]), record.id, record.attempt)
        self._stop(record, Cancel(error.code))
        self._end(now, record)

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
                self.fail(now, record, self._too_late(record))
            elif record.state is QUEUED and not record.service.offers and record.wait <= now:
                self.fail(now, record, self._nobody(record.service))
            else:
                self._remind(record)

    def measure(self, now: float, seconds: float) -> None:
        """Rates of the services, once an interval; names that nobody offers or waits for are forgotten."""
        for service in list(self.services.values()):
            service.measure(now, seconds)
            self._forget(now, service)

    # -- inside

    def _forget(self, now: float, service: Service) -> None:
        if not service.offers and not service.queue.count and now > service.gone_at + self._limits.grace:
            del self.services[service.name]

    def _queue(self, now: float, record: Record, wait_ms: int) -> RalmqError | None:
        """Puts a request into its service's queue; the error to refuse it with where it cannot wait there."""
        service, asker, limits = record.service, record.asker, self._limits
        until = 0.0
        if not service.offers:
            until = max(self._started + limits.grace, service.gone_at + limits.grace, now + wait_ms / 1000)
            if record.attempt:
                until = record.deadline or NEVER
            if until <= now:
                return self._nobody(service)
        record.size = sum(map(len, record.frames))
        full = service.queue.count >= limits.queue or self.queued_bytes + record.size > limits.queue_bytes
        if full or (asker.queued_bytes and asker.queued_bytes + record.size > limits.peer_bytes):
            after = service.retry_after(now)
            waiting = f"{service.queue.count} requests wait for {service.name}"
            return Busy(f"{waiting}: ask again in {after:.2f} s, or start another worker", retry_after=after)
        record.wait = until
        self._enqueue(now, record)
        self._remind(record)
        return None

    def _remind(self, record: Record) -> None:
        """Looks at the requests again when something becomes due for this one."""
        if record.deadline:
            self._due = min(self._due, record.deadline)
        if record.state is QUEUED and not record.service.offers:
            self._due = min(self._due, record.wait)

    def _enqueue(self, now: float, record: Record, *, first: bool = False) -> None:
        if not record.service.queue.count:
            record.service.loaded(now)
        record.state = QUEUED
        record.service.queue.push(record, first=first)
        record.asker.queued_bytes += record.size
        self.queued_bytes += record.size

    def _unqueued(self, record: Record) -> None:
        record.asker.queued_bytes -= record.size
        self.queued_bytes -= record.size

    def _requeue(self, now: float, record: Record) -> None:
        """Another worker gets it next, before what came later; answers to the old leg are fenced off."""
        self.counts["requeued"] += 1
        self._orphan(now, record)
        record.leg += 1
        record.size = sum(map(len, record.frames))
        self._enqueue(now, record, first=True)

    def _next(self, now: float, service: Service, worker: Peer) -> None:
        """What waited longest goes to a worker that has credit."""
        record = service.queue.pop()
        self._unqueued(record)
        self._dispatch(now, record, worker)

    def _dispatch(self, now: float, record: Record, worker: Peer) -> None:
        if record.attempt and not worker.hello.idempotent:
            lost = f"{record.service.name} may have served this request before its connection was cut, and is not "
            record.state = RUNNING  # it has left the queue
            self.fail(now, record, WorkerLost(lost + "safe to repeat: ask anew if you want it done again"))
            return
        record.state = RUNNING
        record.worker = worker
        record.tries += 1
        worker.serving[record.id] = record
        worker.load += 1
        frames = record.frames
        if now != record.queued_at or record.leg != record.attempt:
            left = max(1, int((record.deadline - now) * 1000)) if record.deadline else 0
            frames = [restamped(frames[0], attempt=record.leg, deadline=left), *frames[1:]]
        self._out.append((worker.key, frames))
        if not worker.hello.idempotent:
            record.frames = []  # it will not be sent again: free the memory
        if record.until:  # raised above the window, which is in the REQUEST
            self._tell(worker, Credit(record.until), record.id, record.leg)

    def _forward(self, record: Record, prefix: Prefix, frames: Frames) -> None:
        if prefix.attempt != record.attempt:
            frames = [restamped(frames[0], attempt=record.attempt, deadline=prefix.deadline), *frames[1:]]
        self._out.append((record.asker.key, frames))

    def _end(self, now: float, record: Record) -> None:
        """The one place where a request leaves the table."""
        if record.state is QUEUED:
            record.service.queue.remove(record)
            self._unqueued(record)
        record.state = ENDED
        record.frames = []
        del self.open[record.id]
        del record.asker.asked[record.id]
        if record.worker is not None:
            record.worker.serving.pop(record.id, None)
        self._ended[0][record.id] = record.attempt << 16 | record.leg
        if len(self._ended[0]) >= REMEMBERED:
            self._ended = ({}, self._ended[0])
        if record.parent is not None and record.parent.children is not None:
            record.parent.children.pop(record.id, None)
        if record.children:
            self._orphan(now, record)

    def _orphan(self, now: float, record: Record) -> None:
        """Ends what was asked on behalf of a request, and on behalf of that; a loop, since chains may be long."""
        family = [record]
        for member in family:
            family += (member.children or {}).values()
            member.children = None
        for member in family[1:]:
            self.fail(now, member, RequestCancelled(_ORPHAN))

    def _abandon(self, now: float, record: Record) -> None:
        """Ends a request without a word to its asker."""
        self.counts["abandoned"] += 1
        self._stop(record, Release())
        self._end(now, record)

    def _stop(self, record: Record, message: Cancel | Release) -> None:
        """Tells the serving worker; its credit stays spent until it acknowledges."""
        worker = record.worker
        if worker is not None:
            worker.ending[record.id, record.leg] = record
            self._tell(worker, message, record.id, record.leg)

    def _spare(self, now: float, worker: Peer) -> None:
        """A credit of the worker is free again."""
        worker.load -= 1
        self.feed(now, worker)
        if worker.leaving and not worker.load:
            self.left.append(worker)

    def _stale(self, worker: Peer, prefix: Prefix) -> None:
        self.counts["fenced"] += 1
        if (prefix.id, prefix.attempt) not in worker.owner.ending:
            self._tell(worker, Gone("this attempt is over"), prefix.id, prefix.attempt)

    def _nobody(self, service: Service) -> NoService:
        return NoService(f"no worker offers {service.name}: start one, or see `ralmq status` for what there is")

    def _too_late(self, record: Record) -> DeadlineExceeded:
        name = record.service.name
        if record.state is RUNNING:
            where = f"worker {record.worker.name if record.worker else '?'} of {name} did not end in time"
        elif record.service.workers or not name.startswith("lm:"):
            where = f"no worker of {name} was free in time"
        else:
            where = f"no pipeline of {name} is formed; missing layers: {self._pipelines.missing(name[3:])}"
        return DeadlineExceeded(f"{where}: raise the deadline, or start more workers")

    def _refuse(self, asker: Peer, prefix: Prefix, error: RalmqError) -> None:
        """Answers a request that is not accepted; no state is kept."""
        self.counts[error.code] += 1
        after = int(error.retry_after * 1000)
        self._tell(asker, Error(error.code, error.message[:2000], after), prefix.id, prefix.attempt)

    def _tell(self, peer: Peer, message: Any, identity: bytes, attempt: int) -> None:
        self._out.append((peer.key, encode(message, id=identity, attempt=attempt, epoch=self._epoch)))


_ORPHAN = "the request on whose behalf this one asks is over"


def serves(peer: Peer, record: Record) -> bool:
    """The fence by peer: the worker itself, or any stage of the pipeline that the worker leads."""
    worker = record.worker
    return worker is not None and (worker is peer or (peer.pipeline is not None and worker.pipeline is peer.pipeline))
