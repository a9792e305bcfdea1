"""The life of a request: every transition of a Record happens here and nowhere else. Knows no socket and no clock.

The rule on top: each accepted request ends in exactly one FINAL or ERROR to its asker, a worker's credit is spent
from dispatch until that worker is done with the request (or is lost), and an answer counts only if it comes from
the peer that serves the request now, under the current leg. A request that was in hand of a lost worker is a suspect:
it goes on alone, to a worker with nothing else in hand, and is given up when too many workers were lost with it.
"""

from collections import Counter
from typing import Any

from ..schema.codec import encode
from ..schema.errors import RalmqError, RequestCancelled
from ..schema.frame import restamped
from ..schema.limits import MAX_ATTEMPT
from ..schema.message import Cancel, Credit, Error, Release
from .causes import ORPHAN, lost, poisoned, too_late, unrepeatable
from .limits import RECORD, Limits
from .pipelines import Pipelines
from .quarantine import Quarantine
from .records import Peer, Record, Sent, State
from .services import Service

QUEUED, RUNNING, ENDED = State  # by name: looking a member up in its class costs more than the comparison
NEVER = float("inf")
REMEMBERED = 16_384  # ended requests, twice: a duplicate that comes later than that is served again


class Transitions:
    """The tables of requests and services, and what changes them; what each event means is in requests.py."""

    def __init__(self, out: list[Sent], pipelines: Pipelines, epoch: int, limits: Limits) -> None:
        self.open: dict[bytes, Record] = {}
        self.services: dict[str, Service] = {}
        self.quarantine = Quarantine(limits)
        self.counts: Counter[str] = Counter()
        self.left: list[Peer] = []  # leaving workers whose last request has just ended
        self.queued_bytes = 0
        self.beats = 0  # that were sent to all peers
        self._out = out
        self._pipelines = pipelines
        self._epoch = epoch
        self._limits = limits
        self._due = NEVER  # no deadline and no wait ends before
        self._ended: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})

    def service(self, name: str) -> Service:
        """The service of that name, made where it is new."""
        return self.services.setdefault(name, Service(name))

    def feed(self, now: float, worker: Peer) -> None:
        """Gives a worker with credit what waits for its services."""
        for service in worker.services:
            if service.suspects:
                self._share(now, service)
            else:
                while service.queue.count and worker.load < worker.capacity and worker in service.workers:
                    self._next(now, service, worker)

    def fail(self, now: float, record: Record, error: RalmqError) -> None:
        """Ends a request with an ERROR to its asker; a worker that serves it is told to stop."""
        self.counts[error.code] += 1
        said = Error(error.code, error.message[:2000], worker=error.worker)
        self._tell(record.asker, said, record.id, record.attempt)
        self._stop(record, Cancel(error.code))
        self._end(now, record)

    def _remind(self, record: Record) -> None:
        """Looks at the requests again when something becomes due for this one."""
        if record.deadline:
            self._due = min(self._due, record.deadline)
        if record.state is QUEUED and not record.service.offers:
            self._due = min(self._due, record.wait)

    def _enqueue(self, now: float, record: Record) -> None:
        service = record.service
        if not service.waiting:
            service.loaded(now)
        record.state = QUEUED
        if record.losses:
            service.suspects[record.id] = record
        else:
            service.queue.push(record)
        self.queued_bytes += record.size

    def _bereave(self, now: float, record: Record, worker: Peer, reason: str, gone: Peer) -> None:
        """A request has lost its worker: it goes on as a suspect, under another leg, or ends."""
        record.worker = None
        record.losses += 1
        if not worker.hello.idempotent or record.leg >= MAX_ATTEMPT:
            self.fail(now, record, lost(record, worker.name, reason, gone.name))
        elif record.losses >= self._limits.tries:
            error = poisoned(record, worker.name, reason)
            self.quarantine.add(now, record, error.message, record.frames)
            self.fail(now, record, error)
        else:
            self.counts["requeued"] += 1
            self._orphan(now, record)
            record.leg += 1
            self._enqueue(now, record)

    def _share(self, now: float, service: Service) -> None:
        """Gives out what waits as far as workers have credit; a suspect first, where one has nothing in hand."""
        kept = service.kept
        while service.suspects and (worker := service.alone()) is not None:
            record = next(iter(service.suspects.values()))
            del service.suspects[record.id]
            self._begin(now, record, worker)
        self._release(now, service)
        while service.queue.count and (worker := service.choose()) is not None:
            self._next(now, service, worker)
        if kept is not None and not kept.kept:
            self.feed(now, kept)

    def _release(self, now: float, service: Service) -> None:
        """No suspect waits any more: the worker that was kept for one is free."""
        kept = service.kept
        if kept is not None and not service.suspects:
            service.keep(None)
            self.feed(now, kept)

    def _next(self, now: float, service: Service, worker: Peer) -> None:
        """What is next in turn goes to a worker that has credit."""
        self._begin(now, service.queue.pop(), worker)

    def _begin(self, now: float, record: Record, worker: Peer) -> None:
        """A request has left the queue for a worker; where its deadline has passed it ends instead."""
        self.queued_bytes -= record.size
        if 0.0 < record.deadline <= now:
            error = too_late(record, self._pipelines)
            record.state = RUNNING
            self.counts["expired"] += 1
            self.fail(now, record, error)
        else:
            self._dispatch(now, record, worker)

    def _dispatch(self, now: float, record: Record, worker: Peer) -> None:
        record.state = RUNNING
        if (record.losses or not record.clean) and not worker.hello.idempotent:
            return self.fail(now, record, unrepeatable(record))
        record.worker, record.given = worker, self.beats
        if record.losses:
            worker.alone = True
            worker.bound()
        worker.serving[record.id] = record
        worker.load += 1
        frames = record.frames
        if now != record.queued_at or record.leg != record.attempt:
            left = max(1, int((record.deadline - now) * 1000)) if record.deadline else 0
            frames = [restamped(frames[0], attempt=record.leg, deadline=left), *frames[1:]]
        self._out.append((worker.key, frames))
        if not worker.hello.idempotent:  # it will not be sent again: free the memory
            record.frames = []
            record.asker.held -= record.size - RECORD
            record.size = RECORD
        if record.until:  # raised above the window, which is in the REQUEST
            self._tell(worker, Credit(record.until), record.id, record.leg)
        return None

    def _end(self, now: float, record: Record) -> None:
        """The one place where a request leaves the table."""
        waited = record.state is QUEUED
        if waited:
            if record.service.suspects.pop(record.id, None) is None:
                record.service.queue.remove(record)
            self.queued_bytes -= record.size
        record.state = ENDED
        record.frames = []
        del self.open[record.id]
        del record.asker.asked[record.id]
        record.asker.held -= record.size
        if record.worker is not None:
            record.worker.serving.pop(record.id, None)
        self._ended[0][record.id] = record.asker.user << 32 | record.attempt << 16 | record.leg
        if len(self._ended[0]) >= REMEMBERED:
            self._ended = ({}, self._ended[0])
        if record.parent is not None and record.parent.children is not None:
            record.parent.children.pop(record.id, None)
        if record.children:
            self._orphan(now, record)
        if waited:
            self._release(now, record.service)

    def _orphan(self, now: float, record: Record) -> None:
        """Ends what was asked on behalf of a request, and on behalf of that; a loop, since chains may be long."""
        family = [record]
        for member in family:
            family += (member.children or {}).values()
            member.children = None
        for member in family[1:]:
            self.fail(now, member, RequestCancelled(ORPHAN))

    def _stop(self, record: Record, message: Cancel | Release) -> None:
        """Tells the serving worker; its credit stays spent until it acknowledges."""
        worker = record.worker
        if worker is not None:
            worker.ending[record.id, record.leg] = record
            self._tell(worker, message, record.id, record.leg)

    def _spare(self, now: float, worker: Peer) -> None:
        """A credit of the worker is free again."""
        worker.load -= 1
        if worker.alone:
            worker.alone = False
            worker.bound()
        self.feed(now, worker)
        if worker.leaving and not worker.load:
            self.left.append(worker)

    def _tell(self, peer: Peer, message: Any, identity: bytes, attempt: int) -> None:
        self._out.append((peer.key, encode(message, id=identity, attempt=attempt, epoch=self._epoch)))
