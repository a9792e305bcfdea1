"""What a peer does not take yet, in order and bounded in bytes. Knows no socket.

The socket before it has a bound of its own, see flights.py. A peer that takes nothing is let go when both are full.
"""

from collections import deque

from .records import Frames

FRAME = 256  # bytes that a frame is counted with beside its own: else very small ones would be held without bound


class Outbox:
    """Messages held back, by routing id of the peer they go to."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: dict[bytes, deque[Frames]] = {}
        self._bytes: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def __bool__(self) -> bool:
        return bool(self._held)

    def bound(self, budget: int) -> None:
        """Bytes for each peer from now on; what is held already stays."""
        self._budget = budget

    def hold(self, key: bytes, frames: Frames) -> bool:
        """Keeps a message behind those already held; False, and nothing kept, where the budget is spent."""
        size = _size(frames)
        used = self._bytes.get(key, 0)
        if used and used + size > self._budget:
            return False
        self._held.setdefault(key, deque()).append(frames)
        self._bytes[key] = used + size
        return True

    def peers(self) -> list[bytes]:
        """The peers for which something is held."""
        return list(self._held)

    def first(self, key: bytes) -> Frames:
        """The next message of a peer for which something is held."""
        return self._held[key][0]

    def sent(self, key: bytes) -> bool:
        """The first message is out; True where more is held for the peer."""
        frames = self._held[key].popleft()
        self._bytes[key] -= _size(frames)
        if not self._held[key]:
            self.drop(key)
            return False
        return True

    def drop(self, key: bytes) -> None:
        """Forgets a peer."""
        self._held.pop(key, None)
        self._bytes.pop(key, None)


def _size(frames: Frames) -> int:
    return sum(map(len, frames)) + FRAME * len(frames)
