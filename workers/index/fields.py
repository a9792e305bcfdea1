"""Payload fields of an index's entries: JSON in SQLite, by id, and which entries a filter allows. Knows no vector."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...schema.errors import WorkerFailed
from ...schema.limits import MAX_TOKEN_ID
from .filter import BadFilter, Filter
from .manifest import ManifestError

MAX_FIELDS: Final = 64 << 10  # bytes of one entry's JSON
CACHE: Final = 128 << 20  # bytes of filters that were used lately, with what they allow
_AT_ONCE: Final = 4096
SCHEMA: Final = "CREATE TABLE fields (id INTEGER PRIMARY KEY, fields TEXT NOT NULL)"


class BadFields(ValueError):
    """Fields that cannot be stored; one line that says what is wrong with them."""


def dump_fields(value: Any) -> str:
    """The JSON of one entry's fields. Raises BadFields unless it is a map that JSON holds, of at most 64 KiB."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadFields("is no map of names to values")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError):
        raise BadFields("holds what JSON does not: NaN, infinity, bytes, half a character") from None
    if size > MAX_FIELDS:
        raise BadFields(f"has {size} bytes, at most {MAX_FIELDS} are kept")
    return text


def write_fields(path: Path, ids: Iterable[int], texts: Iterable[str]) -> None:
    """A new database of those entries. Raises OSError, sqlite3.Error."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # nobody sees the directory before it is whole
        database.execute(SCHEMA)
        database.executemany("INSERT INTO fields VALUES (?, ?)", zip(ids, texts, strict=True))
        database.commit()


def check_names(database: sqlite3.Connection, condition: Filter, table: str = "fields") -> None:
    """Raises BadFilter for a field that no entry has; `table` is one of ours with a column `fields`."""
    for path in condition.names:
        if not database.execute(
            f"SELECT 1 FROM {table} WHERE json_type(fields, ?) IS NOT NULL LIMIT 1", (path,)
        ).fetchone():
            name = path.removeprefix("$.").replace('"', "")
            raise BadFilter(f"no entry has the field {name}; filter by one of the fields it was built with")


def matching(database: sqlite3.Connection, condition: Filter) -> NDArray[np.int64]:
    """The ids of the entries for which a filter holds, ascending."""
    found = database.execute(f"SELECT id FROM fields WHERE {condition.sql} ORDER BY id", condition.values)
    return np.fromiter((number for (number,) in found), np.int64)


def tokens_of(fields: Iterable[Mapping[str, Any]], width: int) -> NDArray[np.int32]:
    """The tokens behind each entry, int32 [n, width], -1 for none: those of its field `tokens` behind `split` (0)."""
    rows = []
    for each in fields:
        tokens, split = each.get("tokens"), each.get("split", 0)
        found: list[int] = []
        if isinstance(tokens, list) and type(split) is int and split >= 0:
            found = [_token(token) for token in tokens[split : split + width]]
        rows.append(found + [-1] * (width - len(found)))
    return np.array(rows, np.int32).reshape(len(rows), width)


def _token(value: Any) -> int:
    """-1 for what is no token id: whatever is added comes from outside."""
    return value if type(value) is int and 0 <= value <= MAX_TOKEN_ID else -1


class Fields:
    """The fields of an index that does not change. Safe from several threads.

    Args:
        ids: of the index's rows, ascending; None where they are the rows' numbers.
        rows: of the index.
        whole: it is no shard, so that a field which none of its entries has is a mistake.
    """

    def __init__(self, path: Path, ids: NDArray[np.int64] | None, rows: int, *, whole: bool = True) -> None:
        self._path = path
        self._ids = ids
        self._rows = rows
        self._whole = whole
        self._kept = 0  # bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[Filter, NDArray[np.bool_]] = OrderedDict()
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
            self._database.execute("SELECT id, fields FROM fields LIMIT 1").fetchall()
        except sqlite3.Error as fault:
            raise ManifestError(f"{path}: holds no fields ({fault}); build the index again") from None

    def allowed(self, condition: Filter) -> NDArray[np.bool_]:
        """Which rows a filter allows, bool [rows]; kept for the next request. Raises BadFilter."""
        with self._lock:
            found = self._known.get(condition)
            if found is None:
                found = self._known[condition] = self._computed(condition)
                self._kept += self._rows + condition.size
                while self._kept > CACHE and len(self._known) > 1:
                    self._kept -= self._rows + self._known.popitem(last=False)[0].size
            self._known.move_to_end(condition)
            return found

    def of(self, ids: Iterable[int]) -> dict[int, str]:
        """The JSON of each of the ids that has fields."""
        wanted = sorted(set(ids))
        found: dict[int, str] = {}
        with self._lock:
            for start in range(0, len(wanted), _AT_ONCE):
                chosen = json.dumps(wanted[start : start + _AT_ONCE])
                found.update(
                    self._fetched(
                        "SELECT id, fields FROM fields WHERE id IN (SELECT value FROM json_each(?))", (chosen,)
                    )
                )
        return found

    def _computed(self, condition: Filter) -> NDArray[np.bool_]:
        allowed = np.zeros(self._rows, np.bool_)
        try:
            if self._whole:
                check_names(self._database, condition)
            ids = matching(self._database, condition)
        except sqlite3.Error as fault:
            raise WorkerFailed(f"{self._path}: its database fails ({fault}); build the index again") from fault
        allowed[ids if self._ids is None else np.searchsorted(self._ids, ids)] = True
        return allowed

    def _fetched(self, sql: str, values: Sequence[Any]) -> list[tuple[int, str]]:
        try:
            return self._database.execute(sql, values).fetchall()
        except sqlite3.Error as fault:
            raise WorkerFailed(f"{self._path}: its database fails ({fault}); build the index again") from fault
