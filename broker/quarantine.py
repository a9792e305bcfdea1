"""Requests that were given up because their workers died of them. Knows no rule of when (see requests.py).

Contents are kept within a bound, so that a request can be tried again; they are never shown.
"""

from typing import Any, NamedTuple

from ..schema.errors import Refused
from ..schema.frame import PREFIX, Prefix
from .limits import Limits
from .records import Frames, Record

SHOWN = 400  # characters of the reason


class Entry(NamedTuple):
    """One of them; `frames` is empty where they were not kept."""

    id: bytes
    service: str
    asker: str
    at: float
    why: str
    frames: Frames


class Quarantine:
    """A bounded list, the oldest first; the oldest entries lose their contents, and then their place."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[bytes, Entry] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, now: float, record: Record, why: str, frames: Frames) -> None:
        """Lists a request; `frames` as it was sent."""
        self.drop(record.id)
        self._entries[record.id] = Entry(
            record.id, record.service.name, record.asker.name, now, why[:SHOWN], _copied(frames)
        )
        self.bytes += sum(map(len, frames))
        while len(self._entries) > self._limits.quarantine:
            self.drop(next(iter(self._entries)))
        while self.bytes > self._limits.quarantine_bytes:
            entry = next(entry for entry in self._entries.values() if entry.frames)
            self.bytes -= sum(map(len, entry.frames))
            self._entries[entry.id] = entry._replace(frames=[])

    def listed(self, now: float) -> list[dict[str, Any]]:
        """Plain data; the oldest first."""
        return [
            {
                "id": entry.id.hex(),
                "service": entry.service,
                "asker": entry.asker,
                "age_s": round(now - entry.at, 3),
                "why": entry.why,
                "bytes": sum(map(len, entry.frames)),
                "kept": bool(entry.frames),
            }
            for entry in self._entries.values()
        ]

    def find(self, text: Any, prefix: Prefix) -> tuple[bytes, Frames]:
        """The id of an entry, by its hex or the beginning of that, and its frames, stamped with another prefix.

        Raises:
            Refused: none, or several; or its contents were not kept.
        """
        named = text if isinstance(text, str) and text else "?"
        found = [entry for entry in self._entries.values() if entry.id.hex().startswith(named)]
        if len(found) != 1:
            known = f"{len(found)} requests in quarantine have an id that begins with it"
            raise Refused(f"{named[:40]}: {known}; see `ralmq quarantine list`")
        entry = found[0]
        if not entry.frames:
            raise Refused(f"the contents of {entry.id.hex()} were not kept: ask anew instead")
        flags = entry.frames[0][2]
        head = prefix._replace(flags=flags).pack() + entry.frames[0][PREFIX.size :]
        return entry.id, [head, *entry.frames[1:]]

    def drop(self, identity: bytes) -> None:
        """Takes an entry out, if there is one."""
        entry = self._entries.pop(identity, None)
        if entry is not None:
            self.bytes -= sum(map(len, entry.frames))


def _copied(frames: Frames) -> Frames:
    """Frame 0 as bytes, which can be cut; the others as they came."""
    return [bytes(frames[0]), *frames[1:]] if frames else []
