"""The waiting requests of one service, fair among those who ask. Knows weights, no time and no bound.

Self-clocked fair queueing (Golestani 1994): each request gets a tag, one over its weight behind the tag of the one
before it from the same asker and of the same priority, and the lowest tag is next. A step of priority doubles the
weight: askers of equal priority take turns, one of higher priority gets more turns, and the lowest still gets its
own: nothing starves. All priorities below one weigh less than that one together, so that an asker who spreads its
requests over them at most doubles its share.
"""

from heapq import heapify, heappop, heappush

from .records import Record

SLACK = 64  # entries of requests that are gone, before they are cleared away
Flow = tuple[bytes, int]  # asker and priority


class FairQueue:
    """Bounded by its owner; `count` says how many wait, `fresh` how many of them were sent for the first time."""

    def __init__(self) -> None:
        self.count = 0
        self.fresh = 0
        self._waiting: dict[bytes, Record] = {}
        self._heap: list[tuple[float, int, Record]] = []  # tag, order of arrival
        self._last: dict[Flow, float] = {}  # tag of the youngest request, where it is not behind the clock
        self._clock = 0.0  # tag of the request that left last
        self._order = 0
        self._of: dict[bytes, int] = {}

    def of(self, asker: bytes) -> int:
        """How many of an asker wait."""
        return self._of.get(asker, 0)

    def push(self, record: Record) -> None:
        """Adds a request."""
        flow = (record.asker.key, record.priority)
        tag = self._last[flow] = max(self._last.get(flow, 0.0), self._clock) + 0.5**record.priority
        self._order += 1
        heappush(self._heap, (tag, self._order, record))
        self._waiting[record.id] = record
        self._of[record.asker.key] = self._of.get(record.asker.key, 0) + 1
        self.count += 1
        self.fresh += not record.attempt

    def pop(self) -> Record:
        """Takes the next request of a queue that is not empty."""
        waiting, heap = self._waiting, self._heap
        while True:
            tag, _, record = heappop(heap)
            if waiting.get(record.id) is record:
                break
        self._clock = tag
        self.remove(record)
        return record

    def remove(self, record: Record) -> None:
        """Takes a given request out, which must be in the queue."""
        del self._waiting[record.id]
        self.count -= 1
        self.fresh -= not record.attempt
        asker = record.asker.key
        self._of[asker] -= 1
        if not self._of[asker]:
            del self._of[asker]
        if not self.count:
            self._heap.clear()
            self._last.clear()
            self._clock = 0.0
        elif len(self._heap) > 2 * self.count + SLACK:
            self._heap = [entry for entry in self._heap if self._waiting.get(entry[2].id) is entry[2]]
            heapify(self._heap)
        if len(self._last) > 2 * self.count + SLACK:
            self._last = {flow: tag for flow, tag in self._last.items() if tag > self._clock}

    def ahead(self, asker: bytes, priority: int) -> float:
        """About how many leave before one that came now would: of each flow those whose tags are below its own."""
        clock, weight = self._clock, 0.5**priority
        tag = max(self._last.get((asker, priority), 0.0), clock) + weight
        found = sum((min(tag, last) - clock) / 0.5**of for (_, of), last in self._last.items() if last > clock)
        return min(found, self.count)

    def records(self) -> list[Record]:
        """All waiting requests."""
        return list(self._waiting.values())
