"""What is offered under a name, by whom, and how fast it goes. Knows neither messages nor time of its own."""

from .queue import FairQueue
from .records import Peer

BUSY_FLOOR = 0.02  # seconds: the shortest retry-after
BUSY_CEILING = 10.0  # the pace may have changed by then
EAGERNESS = 1.25  # resends come so much faster than the pace: one more refusal costs less than an idle worker
UNKNOWN_PACE = 1000.0  # requests a second, until it is measured: to ask again too early costs little
SETTLED = 0.05  # seconds of full load that make a measurement


class Service:
    """A name, the workers that offer it, and the requests that wait for one.

    Attributes:
        rate: requests finished a second, as seen from outside, smoothed.
        pace: the same at full load, while requests wait; 0 where that has not been seen.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.workers: list[Peer] = []
        self.offers = 0  # workers and spans that announced the name, ready or not
        self.gone_at = float("-inf")
        self.queue = FairQueue()
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

    def loaded(self, now: float) -> None:
        """Full load begins: a request waits."""
        self._loaded_at, self._loaded_count = now, self.finished

    def measure(self, now: float, seconds: float) -> None:
        """Updates rate and pace, called once an interval; a time without work says nothing about them."""
        if self.finished != self._counted or self.queue.count:
            current = (self.finished - self._counted) / seconds
            self._counted = self.finished
            self.rate = current if not self.rate else 0.7 * self.rate + 0.3 * current
        if self.queue.count:
            self.pace = self._pace(now)
            self.loaded(now)

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
        if seconds < SETTLED or not self.queue.count:
            return self.pace
        current = (self.finished - self._loaded_count) / seconds
        return (self.pace + current) / 2 if self.pace and current else self.pace or current
