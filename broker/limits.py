"""What a broker holds at most, and its rhythm. Knows numbers only."""

from dataclasses import dataclass

RECORD = 2048  # bytes that a request is counted with beside its frames: its record, and the tables that name it


@dataclass(frozen=True, slots=True)
class Limits:
    """What a broker holds at most, and its rhythm.

    Attributes:
        queue: requests that wait for one service; those that are sent again, after the broker was lost, come on top.
        queue_bytes: bytes of waiting requests, all services together.
        peer_bytes: bytes of all that is held for one asker, waiting or kept for another worker while one serves it; a
            single larger request passes when it has no other.
        memory: bytes of the broker's process above which new work is refused; 0 for no bound. Where no limits are
            given, half of what the machine has.
        tries: workers that may be lost with a request of an idempotent service in hand, at least 2.
        quarantine: requests that are listed after that.
        quarantine_bytes: bytes of them that are kept.
        beat: seconds between two BEATs.
    """

    queue: int = 1024
    queue_bytes: int = 1 << 30
    peer_bytes: int = 256 << 20
    memory: int = 0
    tries: int = 3
    quarantine: int = 100
    quarantine_bytes: int = 64 << 20
    beat: float = 1.0

    @property
    def grace(self) -> float:
        """Seconds for which a broker that just started waits for workers to announce themselves."""
        return 3 * self.beat

    @property
    def absence(self) -> float:
        """Seconds for which a service may be gone, as while its last worker's process is started anew and loads."""
        return 10 * self.beat
