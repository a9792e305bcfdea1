"""Large messages that libzmq has not sent yet: its high-water mark counts messages, whatever their size. Part of the
shell: knows zmq, no rule of the broker."""

from typing import Any, Final, NamedTuple

import zmq

from .records import Frames

LARGE: Final = (1 << 20) + (64 << 10)  # bytes; of smaller ones the high-water mark lets few enough through


class Flight(NamedTuple):
    """A message in libzmq's hands: its bytes, and what tells that its last frame was let go."""

    size: int
    left: Any  # zmq.MessageTracker


class Flights:
    """Large messages under way, by routing id of the peer they go to.

    libzmq frees a frame once it is written to the connection, so a message whose last frame is freed has left. A frame
    that says so costs some microseconds more, which a MiB takes a hundred times.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._flights: dict[bytes, list[Flight]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def room(self, key: bytes, size: int) -> bool:
        """Whether a message may go to libzmq as well; one always may."""
        flights = self._flights.get(key)
        if flights is None:
            return True
        flights[:] = [flight for flight in flights if not flight.left.done]
        return not flights or sum(flight.size for flight in flights) + size <= self._budget

    def watched(self, frames: Frames) -> tuple[Frames, Any]:
        """The same frames, the last of which tells when it has left; and what it tells it to."""
        last = zmq.Frame(getattr(frames[-1], "buffer", frames[-1]), track=True, copy=False)
        return [*frames[:-1], last], last.tracker

    def add(self, key: bytes, size: int, left: Any) -> None:
        """libzmq has taken it."""
        self._flights.setdefault(key, []).append(Flight(size, left))

    def tidy(self) -> None:
        """Forgets what has left, also to peers that are gone."""
        for key, flights in list(self._flights.items()):
            if all(flight.left.done for flight in flights):
                del self._flights[key]
