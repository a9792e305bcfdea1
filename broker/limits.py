"""What a broker holds at most, and its rhythm. Knows numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a broker holds at most, and its rhythm.

    Attributes:
        queue: requests that wait for one service.
        queue_bytes: their bytes, all services together.
        peer_bytes: bytes of waiting requests of one asker; a single larger request passes when it has no other.
        tries: workers that a request of an idempotent service is given to, one after another.
        beat: seconds between two BEATs.
    """

    queue: int = 1024
    queue_bytes: int = 1 << 30
    peer_bytes: int = 64 << 20
    tries: int = 3
    beat: float = 1.0

    @property
    def grace(self) -> float:
        """Seconds for which a service that just left, or a broker that just started, is given time."""
        return 3 * self.beat
