"""The waiting requests of one service: higher priority first, then the askers in turn, then in order of arrival."""

from .records import Record


class FairQueue:
    """Bounded by its owner; `count` says how full it is."""

    def __init__(self) -> None:
        self.count = 0
        self._levels: dict[int, dict[bytes, dict[bytes, Record]]] = {}  # priority -> asker -> id -> record

    def push(self, record: Record, *, first: bool = False) -> None:
        """Adds a request; `first` puts one that was already under way before its asker's others."""
        askers = self._levels.setdefault(record.priority, {})
        line = askers.setdefault(record.asker.key, {})
        if first:
            askers[record.asker.key] = {record.id: record, **line}
        else:
            line[record.id] = record
        self.count += 1

    def pop(self) -> Record:
        """Takes the next request of a queue that is not empty; its asker goes behind the others of its priority."""
        priority = max(self._levels)
        askers = self._levels[priority]
        key = next(iter(askers))
        line = askers.pop(key)
        record = line.pop(next(iter(line)))
        if line:
            askers[key] = line
        elif not askers:
            del self._levels[priority]
        self.count -= 1
        return record

    def remove(self, record: Record) -> None:
        """Takes a given request out, which must be in the queue."""
        askers = self._levels[record.priority]
        line = askers[record.asker.key]
        del line[record.id]
        if not line:
            del askers[record.asker.key]
            if not askers:
                del self._levels[record.priority]
        self.count -= 1

    def records(self) -> list[Record]:
        """All waiting requests."""
        return [record for askers in self._levels.values() for line in askers.values() for record in line.values()]
