"""What is offered under a name, by whom, and how fast it goes. Knows neither messages nor time of its own."""

from .queue import FairQueue
from .records import Peer, Record

BUSY_FLOOR = 0.02  # seconds: the shortest retry-after
BUSY_CEILING = 10.0  # the pace may have changed by then
EAGERNESS = 1.25  # resends come so much faster than the pace: one more refusal costs less than an idle worker
UNKNOWN_PACE = 1000.0  # requests a second, until it is measured: to ask again too early costs little
SETTLED = 0.05  # seconds of full load that make a measurement
WAITED = 0.5  # the part of its time that a request may be expected to wait; the rest is to serve it


class Service:
    """A name, the workers that offer it, and the requests that wait for one.

    Attributes:
        suspects: requests that wait, too, and that were in hand of workers that were lost; each is given to a worker
            that has nothing else in hand, so that the loss of that one harms and condemns no other.
        kept: the worker that gets nothing new until it can take a suspect.
        rate: requests finished a second, as seen from outside, smoothed.
        pace: the same at full load, while requests wait; 0 where that has not been seen.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.workers: list[Peer] = []
        self.offers = 0  # workers and spans that announced the name, ready or not
        self.gone_at = float("-inf")
        self.queue = FairQueue()
        self.suspects: dict[bytes, Record] = {}
        self.kept: Peer | None = None
        self.finished = 0
        self.rate = 0.0
        self.pace = 0.0
        self._counted = 0
        self._loaded_at = 0.0  # begin of the full load, or of the interval
        self._loaded_count = 0
        self._promised = 0.0  # refused requests that were told when to come again and for which it is not yet time
        self._promised_at = 0.0

    def choose(self) -> Peer | None:
        """The worker with the least outstanding work and credit left."""
        best: Peer | None = None
        least = 1 << 62
        for worker in self.workers:
            load = worker.load
            if load < least and load < worker.capacity:
                best, least = worker, load
        return best

    def alone(self) -> Peer | None:
        """A worker with nothing in hand, for a suspect; where there is none, the least loaded one is kept for it."""
        found = next((worker for worker in self.workers if not worker.load), None)
        kept = self.kept
        if found is not None:
            kept = None
        elif kept not in self.workers:
            kept = min(self.workers, key=lambda worker: worker.load, default=None)
        self.keep(kept)
        return found

    def keep(self, worker: Peer | None) -> None:
        """This worker, and no other, gets nothing new."""
        for peer, change in ((self.kept, -1), (worker, 1)):
            if peer is not None:
                peer.kept += change
                peer.bound()
        self.kept = worker

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self.queue.count + len(self.suspects)

    def records(self) -> list[Record]:
        """The requests that wait."""
        return [*self.suspects.values(), *self.queue.records()]

    def loaded(self, now: float) -> None:
        """Full load begins: a request waits."""
        self._loaded_at, self._loaded_count = now, self.finished

    def measure(self, now: float, seconds: float) -> None:
        """Updates rate and pace, called once an interval; a time without work says nothing about them."""
        if self.finished != self._counted or self.waiting:
            current = (self.finished - self._counted) / seconds
            self._counted = self.finished
            self.rate = current if not self.rate else 0.7 * self.rate + 0.3 * current
        if self.waiting:
            self.pace = self._pace(now)
            self.loaded(now)

    def in_time(self, now: float, record: Record) -> bool:
        """Whether the turn of a new request is expected early enough for its deadline; so where the pace is not known.

        A queue of requests whose time is almost up when their turn comes keeps every worker busy for nobody.
        """
        pace = self._pace(now)
        if not pace or not record.deadline:
            return True
        return self.queue.ahead(record.asker.key, record.priority) <= WAITED * pace * (record.deadline - now)

    def retry_after(self, now: float) -> float:
        """Seconds until a resend is expected to find room.

        Each refused request is promised a place of its own behind those already promised, spaced by the pace of the
        service, so that the resends of a burst come back spread out and not all at once. Beyond the ceiling the places
        begin anew: more of them come than find room, but never all together after a time of nothing.
        """
        pace = EAGERNESS * self._pace(now) or UNKNOWN_PACE
        self._promised = max(0.0, self._promised - pace * (now - self._promised_at)) + 1.0
        self._promised_at = now
        if self._promised > BUSY_CEILING * pace:
            self._promised = 1.0
        return min(BUSY_FLOOR + self._promised / pace, BUSY_CEILING)

    def _pace(self, now: float) -> float:
        """Half of what was known, half of what this stretch of full load shows."""
        seconds = now - self._loaded_at
        if seconds < SETTLED or not self.waiting:
            return self.pace
        current = (self.finished - self._loaded_count) / seconds
        return (self.pace + current) / 2 if self.pace and current else self.pace or current
