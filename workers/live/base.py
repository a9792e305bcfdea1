"""What a live index starts from: a built index, whose entries keep their payloads. Knows no change."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..index.fields import matching
from ..index.filter import Filter
from ..index.manifest import FIELDS, MANIFEST, ManifestError, record_file
from ..index.store import OpenIndex, open_index

SAID: Final = ("kind", "model", "fingerprint", "tokens_per_payload")


class Base:
    """A built index beneath a live one: its payloads, its tokens, its fields.

    Args:
        fresh: whether its vectors will be searched; else they are left on the disk.
    """

    def __init__(self, directory: Path, fresh: bool) -> None:
        """Raises ManifestError."""
        self.index: OpenIndex = open_index(directory, mmap=not fresh)
        self.sha256 = record_file(directory / MANIFEST).sha256
        manifest = self.index.manifest
        if manifest.by == "list":
            raise ManifestError(f"{directory}: is a shard by list, which takes no changes; build it with --by rows")
        own = self.index.segment.ids
        self.ids = np.arange(manifest.ntotal) if own is None else own
        self._lock = threading.Lock()
        self._known: dict[Filter, NDArray[np.int64]] = {}
        self._database: sqlite3.Connection | None = None
        if FIELDS in manifest.files:
            uri = f"{(directory / FIELDS).absolute().as_uri()}?mode=ro&immutable=1"
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)

    @property
    def said(self) -> dict[str, Any]:
        """Of what an index says of itself, what a live one keeps."""
        info = self.index.info()
        return {name: info[name] for name in SAID}

    @property
    def fielded(self) -> bool:
        """Whether its entries have payloads."""
        return self._database is not None or self.index.datastore is not None

    def names(self, path: str) -> bool:
        """Whether an entry has the field with that JSON path."""
        sql = "SELECT 1 FROM fields WHERE json_type(fields, ?) IS NOT NULL LIMIT 1"
        with self._lock:
            return self._database is not None and self._database.execute(sql, (path,)).fetchone() is not None

    def matching(self, condition: Filter) -> NDArray[np.int64]:
        """The ids of the entries for which a filter holds; kept for the next request."""
        with self._lock:
            if self._database is None:  # no entry has any field
                with sqlite3.connect(":memory:") as empty:
                    sql = f"SELECT ({condition.sql}) FROM (SELECT '{{}}' AS fields)"
                    held = empty.execute(sql, condition.values).fetchone()[0]
                return self.ids if held else self.ids[:0]
            if condition not in self._known:
                if len(self._known) >= 16:
                    self._known.pop(next(iter(self._known)))
                self._known[condition] = matching(self._database, condition)
            return self._known[condition]

    def payloads(self, ids: NDArray[np.int64]) -> list[dict[str, Any]]:
        """What is known of each entry of `ids` [n]: passages of a datastore, else fields."""
        if not len(ids):
            return []
        if self.index.datastore is not None:
            return self.index.datastore.maps(np.searchsorted(self.ids, ids))
        if self._database is None:
            return [{} for _ in ids]
        with self._lock:
            sql = "SELECT id, fields FROM fields WHERE id IN (SELECT value FROM json_each(?))"
            found = dict(self._database.execute(sql, (json.dumps(ids.tolist()),)))
        return [json.loads(found[number]) if number in found else {} for number in ids.tolist()]

    def following(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tokens behind each entry of `ids` [n] of a datastore, int32 [n, 8]."""
        return self.index.following(ids)
