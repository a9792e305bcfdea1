"""How long something went on in all. Knows the time and nothing else."""

import time
from collections.abc import Callable


class Stopwatch:
    """Adds up the time during which it runs."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._sum = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """In all, up to now."""
        return self._sum + (0.0 if self._since is None else self._now() - self._since)

    def run(self, on: bool) -> None:
        """Goes on, or stops; again the same changes nothing."""
        if on != (self._since is not None):
            self._sum = self.seconds
            self._since = self._now() if on else None

    def reset(self) -> None:
        """Stops, at zero."""
        self._sum, self._since = 0.0, None
