"""What is offered under a name, by whom, and how fast it goes. Knows neither messages nor time of its own."""

from .queue import FairQueue
from .records import Peer

BUSY_FLOOR = 0.02  # seconds: the shortest retry-after
BUSY_CEILING = 10.0


class Service:
    """A name, the workers that offer it, and the requests that wait for one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.workers: list[Peer] = []
        self.offers = 0  # workers and spans that announced the name, ready or not
        self.gone_at = float("-inf")
        self.queue = FairQueue()
        self.finished = 0
        self.rate = 0.0  # requests finished a second, smoothed
        self._counted = 0
        self._promised = 0.0

    def choose(self) -> Peer | None:
        """The worker with the least outstanding work and credit left."""
        best: Peer | None = None
        least = 1 << 62
        for worker in self.workers:
            load = worker.load
            if load < least and load < worker.hello.capacity:
                best, least = worker, load
        return best

    def measure(self, seconds: float) -> None:
        """Updates the rate, called once an interval; a time without work says nothing about it."""
        if self.finished == self._counted and not self.queue.count:
            return
        current = (self.finished - self._counted) / seconds
        self._counted = self.finished
        self.rate = current if not self.rate else 0.7 * self.rate + 0.3 * current

    def retry_after(self, now: float) -> float:
        """Seconds until a resend is expected to find room.

        Each refused request is promised a place of its own behind those already promised, spaced by the measured
        rate, so that the resends of a burst come back spread out and not all at once.
        """
        rate = self.rate or 1.0 / BUSY_FLOOR
        self._promised = max(self._promised, now + BUSY_FLOOR) + 1.0 / rate
        self._promised = min(self._promised, now + BUSY_CEILING)
        return self._promised - now
