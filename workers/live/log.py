"""The log of changes of a live index and the fields of its entries, in SQLite. Knows no faiss and no segment.

Each change has a sequence number. An entry's version is alive from `born` to `died`, so that what is read at one number
stays what it was while later changes go on.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..index.filter import Filter
from ..index.manifest import ManifestError

LIVE: Final = "live.db"
FORMAT: Final = 1
REMEMBERED: Final = 100_000  # changes whose answers are kept for a request that comes again
_PATIENCE: Final = 10.0  # seconds that a connection waits for another's lock
_AT_ONCE: Final = 500  # ids of one SELECT
_SCHEMA: Final = (
    "CREATE TABLE state (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    # died IS NULL: alive; an entry of the base that died has born 0 and no vectors row
    "CREATE TABLE entries (id INTEGER, born INTEGER, died INTEGER, fields TEXT, PRIMARY KEY (id, born)) WITHOUT ROWID",
    "CREATE INDEX dead ON entries (died) WHERE died IS NOT NULL",
    "CREATE TABLE vectors (seq INTEGER PRIMARY KEY, ids BLOB, vectors BLOB)",
    "CREATE TABLE requests (id BLOB PRIMARY KEY, seq INTEGER, reply BLOB) WITHOUT ROWID",
    "CREATE TABLE names (path TEXT PRIMARY KEY) WITHOUT ROWID",
)
_ALIVE: Final = "born <= :seq AND (died IS NULL OR died > :seq)"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a live index is, fixed when it is made.

    Attributes:
        factory: faiss's string for what its vectors are merged into.
        version: what its answers are called by; shards of one index share it.
        base: sha256 of the manifest of the built index that it starts from; "" where it starts empty.
        shard, shards: it holds the ids with id % shards == shard.
    """

    name: str
    dimension: int
    metric: str
    factory: str
    encoder: str = ""
    version: str = ""
    base: str = ""
    shard: int = 0
    shards: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Logged:
    """One change as it is written: entries that died by it, and entries that it made (fields as JSON texts)."""

    seq: int
    dead: NDArray[np.int64]
    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    fields: Sequence[str]
    names: Iterable[str]
    request: bytes
    reply: bytes


class Log:
    """The open database of one live index; one thread writes, any may read."""

    def __init__(self, directory: Path) -> None:
        """Raises ManifestError where there is none that can be read."""
        self.path = directory / LIVE
        self._reading = threading.Lock()
        try:
            self._writer = _connect(self.path, "rw")
            self._reader = _connect(self.path, "ro")
            self._writer.execute("PRAGMA synchronous = FULL")
            found: dict[str, Any] = dict(self._writer.execute("SELECT name, value FROM state"))
            if found.pop("format", None) != FORMAT:
                raise ManifestError(f"{self.path}: is no log of a live index that this ralmq reads (format {FORMAT})")
            self.next_id = int(found.pop("next_id"))
            self.forgotten = int(found.pop("forgotten"))
            self.seq = int(found.pop("seq"))
            self.settings = Settings(**found)
            self.names = {path for (path,) in self._writer.execute("SELECT path FROM names")}
        except (sqlite3.Error, TypeError, ValueError, KeyError) as fault:
            raise ManifestError(f"{self.path}: cannot be read ({fault}); restore it from a copy") from None

    def close(self) -> None:
        """Ends both connections."""
        with self._reading:
            self._reader.close()
            self._writer.close()

    def commit(self, changes: Sequence[Logged], next_id: int) -> None:
        """Writes changes, all or none; they are on the disk when it returns. Raises sqlite3.Error."""
        with _transaction(self._writer) as database:
            for change in changes:
                self._write(database, change)
            seq = changes[-1].seq
            database.executemany("UPDATE state SET value = ? WHERE name = ?", [(seq, "seq"), (next_id, "next_id")])
            if seq // 1000 != self.seq // 1000:
                database.execute("DELETE FROM requests WHERE seq <= ?", (seq - REMEMBERED,))
        self.seq, self.next_id = seq, next_id
        self.names.update(*(change.names for change in changes))

    def _write(self, database: sqlite3.Connection, change: Logged) -> None:
        seq = change.seq
        if len(change.dead):
            dead = change.dead.tolist()
            ended = database.executemany(
                "UPDATE entries SET died = ? WHERE id = ? AND died IS NULL", [(seq, id) for id in dead]
            )
            if ended.rowcount < len(dead):  # the others are of the base
                database.executemany(
                    "INSERT INTO entries SELECT ?1, 0, ?2, '{}'"
                    " WHERE NOT EXISTS (SELECT 1 FROM entries WHERE id = ?1 AND died = ?2)",
                    [(id, seq) for id in dead],
                )
        if len(change.ids):
            rows = zip(change.ids.tolist(), change.fields, strict=True)
            database.executemany("INSERT INTO entries VALUES (?, ?, NULL, ?)", [(id, seq, text) for id, text in rows])
            blobs = (change.ids.tobytes(), change.vectors.tobytes())
            database.execute("INSERT INTO vectors VALUES (?, ?, ?)", (seq, *blobs))
            fresh = [(path,) for path in change.names if path not in self.names]
            database.executemany("INSERT OR IGNORE INTO names VALUES (?)", fresh)
        if change.request:
            database.execute("INSERT OR REPLACE INTO requests VALUES (?, ?, ?)", (change.request, seq, change.reply))

    def answered(self, request: bytes) -> bytes | None:
        """What a request was answered with, where it came before; read by the thread that writes."""
        found = self._writer.execute("SELECT reply FROM requests WHERE id = ?", (request,)).fetchone()
        return None if found is None else bytes(found[0])

    def fields(self, ids: Iterable[int], seq: int) -> dict[int, dict[str, Any]]:
        """The fields of those of `ids` that were added, as they were at `seq`."""
        wanted = sorted(set(ids))
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ", ".join(map(str, some))  # whole numbers of our own: not text of an asker
            sql = f"SELECT id, fields FROM entries WHERE id IN ({marks}) AND {_ALIVE}"
            found.update((id, json.loads(text)) for id, text in self._read(sql, {"seq": seq}))
        return found

    def alive(self, seq: int, condition: Filter | None = None) -> NDArray[np.int64]:
        """The added ids that were alive at `seq` and meet the condition, ascending."""
        sql, values = f"SELECT id FROM entries WHERE {_ALIVE}", {"seq": seq}
        if condition is not None:
            # positional placeholders of the condition come behind: the sequence number is written out
            sql = sql.replace(":seq", str(int(seq))) + f" AND ({condition.sql})"
            rows = self._read(sql + " ORDER BY id", condition.values)
        else:
            rows = self._read(sql + " ORDER BY id", values)
        return np.fromiter((id for (id,) in rows), np.int64, len(rows))

    def since(self, seq: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """What has changed behind `seq`: ids that died, and what was added and is alive, ids [n] and vectors [n, d].

        Raises ManifestError where that was forgotten.
        """
        if seq < self.forgotten:
            raise ManifestError(
                f"{self.path}: the changes behind {seq} were written to a snapshot that is missing or damaged; restore "
                "the newest snapshot directory"
            )
        dead = self._read("SELECT DISTINCT id FROM entries WHERE born <= :seq AND died > :seq", {"seq": seq})
        ids, vectors = [np.empty(0, np.int64)], [np.empty((0, self.settings.dimension), np.float32)]
        alive = dict(self._read("SELECT id, born FROM entries WHERE born > :seq AND died IS NULL", {"seq": seq}))
        for born, ids_blob, blob in self._read("SELECT * FROM vectors WHERE seq > :seq ORDER BY seq", {"seq": seq}):
            some = np.frombuffer(ids_blob, np.int64)
            kept = np.array([alive.get(id) == born for id in some.tolist()], bool)
            ids.append(some[kept])
            vectors.append(np.frombuffer(blob, np.float32).reshape(len(some), -1)[kept])
        return np.array([id for (id,) in dead], np.int64), np.concatenate(ids), np.concatenate(vectors)

    def forget(self, seq: int) -> None:
        """Drops what only a restart from before `seq` would need; in the thread that writes. Raises sqlite3.Error."""
        with _transaction(self._writer) as database:
            database.execute("DELETE FROM vectors WHERE seq <= ?", (seq,))
            database.execute("DELETE FROM entries WHERE died <= ?", (seq,))
            database.execute("UPDATE state SET value = ? WHERE name = 'forgotten'", (seq,))
        self.forgotten = seq

    def _read(self, sql: str, values: Mapping[str, Any] | Sequence[Any]) -> list[Any]:
        with self._reading:
            return self._reader.execute(sql, values).fetchall()


def create(directory: Path, settings: Settings, next_id: int = 0) -> None:
    """Makes the log of a live index in `directory`, whole or not at all. Raises FileExistsError, OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    path, fresh = directory / LIVE, directory / f".{LIVE}.{secrets.token_hex(4)}"
    facts = {name: getattr(settings, name) for name in Settings.__slots__}
    facts["version"] = settings.version or secrets.token_hex(8)
    facts |= {"format": FORMAT, "seq": 0, "forgotten": 0, "next_id": next_id}
    try:
        with closing(_connect(fresh, "rwc")) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            with _transaction(database):
                for statement in _SCHEMA:
                    database.execute(statement)
                database.executemany("INSERT INTO state VALUES (?, ?)", facts.items())
        path.hardlink_to(fresh)
    finally:
        fresh.unlink(missing_ok=True)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
