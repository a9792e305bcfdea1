"""Coarse timers: what is due is found by bucket, so that a request costs one dict entry and no clock call."""

from .records import Record

BUCKET = 0.01  # seconds; a timer fires at most this much late, and never early


class Timers:
    """Requests by the time at which something is to happen to them."""

    def __init__(self, now: float) -> None:
        self._buckets: dict[int, dict[bytes, Record]] = {}
        self._done = int(now / BUCKET)

    def add(self, record: Record, when: float) -> None:
        """Fires once `now` has passed `when` (seconds); at once where it lies in the past."""
        self._buckets.setdefault(max(self._done, int(when / BUCKET)) + 1, {})[record.id] = record

    def remove(self, record: Record, when: float) -> None:
        """Takes back an `add` with the same arguments; nothing happens where it has fired."""
        number = int(when / BUCKET) + 1
        bucket = self._buckets.get(number)
        if bucket is not None and bucket.get(record.id) is record:
            del bucket[record.id]
            if not bucket:
                del self._buckets[number]

    def due(self, now: float) -> list[Record]:
        """The requests whose time has come since the last call."""
        last = int(now / BUCKET)
        if last - self._done > len(self._buckets):  # after a long sleep: look at what is there, not at every number
            numbers = sorted(number for number in self._buckets if number <= last)
        else:
            numbers = [number for number in range(self._done + 1, last + 1) if number in self._buckets]
        self._done = max(self._done, last)
        return [record for number in numbers for record in self._buckets.pop(number).values()]
