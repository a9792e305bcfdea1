"""An index of texts: BM25 search over passages, and changes to them while it is searched. Knows no message.

Ranking is SQLite's own, bm25() of FTS5 (Robertson and Zaragoza 2009; k1 1.2, b 0.75): https://sqlite.org/fts5.html
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from ...schema.errors import RequestCancelled, WorkerFailed
from ..index.directory import replacing
from ..index.fields import check_names
from ..index.query import BadQuery, Found, Params
from .files import (
    BUILT,
    LIVE,
    OWN,
    TextManifest,
    begin_changes,
    check_live,
    open_built,
    open_live,
    read_text_manifest,
    write_manifest,
)

MAX_WORDS: Final = 512  # different words of a query that count, its first
LAST_ID: Final = (1 << 62) - 1
SNAPSHOTS: Final = "snapshots"
REMEMBERED: Final = 100_000  # changes whose answers are kept for a request that comes again
_REQUESTS: Final = (
    "CREATE TABLE IF NOT EXISTS requests (id BLOB PRIMARY KEY, change INTEGER, answer TEXT) WITHOUT ROWID"
)
_WORD: Final = re.compile(r"[^\W_]+")

GivenUp = Callable[[], bool]


class Row(NamedTuple):
    """A passage with its fields as JSON."""

    text: str
    fields: str


class TextIndex:
    """A text index that is served. Searching and changing are safe from several threads, and from several processes.

    Raises ManifestError where the manifest, or what it promises, does not hold.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.manifest: TextManifest = read_text_manifest(path)
        check_live(path, self.manifest)
        self._idle: list[tuple[bool, sqlite3.Connection]] = []
        self._changing = threading.Lock()

    def info(self) -> dict[str, Any]:
        """ "ntotal" passages, "changes" made since it was built, and "version", which is another after each of them."""
        with self._reading() as database:
            ((count,),) = database.execute("SELECT count(*) FROM passages_docsize")
            changes, version = _state(database, "changes"), self._version(database)
        return {
            "ntotal": count,
            "changes": changes,
            "fingerprint": self.manifest.file.sha256[:16],
            "version": version,
        }

    def search(
        self, texts: Sequence[str], params: Params, payloads: bool = False, given_up: GivenUp = lambda: False
    ) -> tuple[Found, list[list[Row | None]], str]:
        """The k best passages of each text, all of one version: ids, BM25 scores (higher is nearer), with `payloads`
        the passages, and the version. Words are joined by or; a passage with none of them is not found.

        Where fewer than k are found the id is -1, the score -inf, the row None. Raises RequestCancelled where it is
        given up, BadFilter for a field that no passage has.
        """
        shape = (len(texts), params.k)
        ids, scores = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        rows: list[list[Row | None]] = []
        condition, values = (f"AND ({params.filter.sql})", params.filter.values) if params.filter else ("", ())
        ranked = (
            f"SELECT rowid, -bm25(passages) FROM passages WHERE passages MATCH ? {condition} ORDER BY 2 DESC, 1 LIMIT ?"
        )
        with self._reading() as database:
            if params.filter:
                check_names(database, params.filter, "passages")
            for place, text in enumerate(texts):
                if given_up():
                    raise RequestCancelled("nobody waits for the answer any more")
                words = expression(text)
                found = database.execute(ranked, (words, *values, params.k)).fetchall() if words else []
                best = np.array([score for _, score in found], np.float32)
                numbers = np.array([number for number, _ in found], np.int64)
                order = np.lexsort((numbers, -best))  # again, since scores that differed may be one float32
                ids[place, : len(found)], scores[place, : len(found)] = numbers[order], best[order]
                if payloads:
                    rows.append([_row(database, number) for number in ids[place].tolist()])
            version = self._version(database)
        return (ids, scores), rows, version

    def add(
        self, rows: Sequence[Row], ids: Sequence[int] | None = None, upsert: bool = False, request: bytes = b""
    ) -> list[int]:
        """Adds passages, all or none, on the disk when it returns; numbered on from the largest id ever where not told.

        Args:
            request: names the request that this is; one that comes again is answered, and not done, again.

        Raises BadQuery for an id that is there, unless it may be replaced.
        """
        with self._changed() as database:
            known: list[int] | None = _answered(database, request)
            if known is not None:
                return known
            following = _state(database, "next")
            chosen = list(range(following, following + len(rows))) if ids is None else list(ids)
            for number, row in zip(chosen, rows, strict=True):
                if ids is not None and _there(database, number):
                    if not upsert:
                        raise BadQuery(f"id {number} is there already; send upsert true to replace it")
                    database.execute("DELETE FROM passages WHERE rowid = ?", (number,))
                statement = "INSERT INTO passages (rowid, text, fields) VALUES (?, ?, ?)"
                database.execute(statement, (number, row.text, row.fields))
            largest = max([following, *(number + 1 for number in chosen)])
            database.execute("UPDATE state SET value = ? WHERE name = 'next'", (largest,))
            _remember(database, request, chosen)
        return chosen

    def delete(self, ids: Sequence[int], request: bytes = b"") -> int:
        """Deletes those of the ids that are there, and says how many were; on the disk when it returns. See `add`."""
        with self._changed() as database:
            known: int | None = _answered(database, request)
            if known is not None:
                return known
            there = [number for number in dict.fromkeys(ids) if _there(database, number)]
            database.executemany("DELETE FROM passages WHERE rowid = ?", [(number,) for number in there])
            _remember(database, request, len(there))
        return len(there)

    def snapshot(self) -> str:
        """Writes the state of now as an index directory of its own, snapshots/<version> in this one; its version.

        Raises OSError.
        """
        with self._changing:
            info = self.info()
            version = str(info["version"])
            manifest = self.manifest
            with replacing(self.place(version), OWN) as fresh, self._connection() as database:
                database.execute("VACUUM INTO ?", (str(fresh / BUILT),))
                write_manifest(fresh, manifest.name, info["ntotal"], manifest.words, manifest.overlap, manifest.sources)
        return version

    def place(self, version: str) -> Path:
        """Where the snapshot of that version lies."""
        return self._path.absolute() / SNAPSHOTS / version

    def close(self) -> None:
        """Closes what is not in use."""
        while self._idle:
            self._idle.pop()[1].close()

    # -- inside

    def _version(self, database: sqlite3.Connection) -> str:
        return f"{self.manifest.file.sha256[:12]}.{_state(database, 'changes')}"

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own to what is served now; kept for the next."""
        live = (self._path / LIVE).exists()  # asked each time: another process may have made the first change
        database = None
        while database is None and self._idle:
            was, idle = self._idle.pop()
            if was == live:
                database = idle
            else:
                idle.close()
        try:
            if database is None:
                database = open_live(self._path) if live else open_built(self._path)
            yield database
        except sqlite3.Error as fault:
            raise WorkerFailed(f"{self._path}: its database fails ({fault}); see that the disk has room") from fault
        finally:
            if database is not None:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                self._idle.append((live, database))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Whatever is read within it belongs to one state."""
        with self._connection() as database:
            database.execute("BEGIN")
            yield database

    @contextmanager
    def _changed(self) -> Iterator[sqlite3.Connection]:
        """One change, committed at the end; none where it raises."""
        with self._changing:
            begin_changes(self._path, self.manifest)
            with self._connection() as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(_REQUESTS)
                yield database
                database.execute("UPDATE state SET value = value + 1 WHERE name = 'changes'")
                database.execute("COMMIT")


def expression(text: str) -> str:
    """A query of FTS5 for any of the words of a text, whatever signs are in it; empty where it has none."""
    words = {word.casefold(): word for word in _WORD.findall(unicodedata.normalize("NFC", text))}
    return " OR ".join(f'"{word}"' for word in list(words.values())[:MAX_WORDS])


def row_of(fields: Mapping[str, Any], most: int) -> Row:
    """A passage from the fields of a request: `text`, and whatever else is known of it.

    Raises BadQuery for one without a text, over `most` bytes, or with what JSON cannot hold.
    """
    rest = dict(fields)
    text = rest.pop("text", None)
    if not isinstance(text, str) or not _WORD.search(text):
        raise BadQuery("fields: each needs a text with a word in it")
    try:
        written = json.dumps(rest, ensure_ascii=False, allow_nan=False)
        size = len(text.encode()) + len(written.encode())
    except (TypeError, ValueError):
        raise BadQuery("fields: send texts, finite numbers, true, false, lists and maps with text keys") from None
    if size > most:
        raise BadQuery(f"fields: a passage has {size} bytes, at most {most} are kept; cut it into passages")
    return Row(text, written)


def _row(database: sqlite3.Connection, number: int) -> Row | None:
    if number < 0:
        return None
    return Row(*database.execute("SELECT text, fields FROM passages WHERE rowid = ?", (number,)).fetchone())


def _there(database: sqlite3.Connection, number: int) -> bool:
    return database.execute("SELECT 1 FROM passages_docsize WHERE id = ?", (number,)).fetchone() is not None


def _answered(database: sqlite3.Connection, request: bytes) -> Any:
    """What a request was answered with that came before; None where it did not."""
    found = database.execute("SELECT answer FROM requests WHERE id = ?", (request,)).fetchone()
    return None if found is None else json.loads(found[0])


def _remember(database: sqlite3.Connection, request: bytes, answer: Any) -> None:
    if request:
        change = _state(database, "changes")
        database.execute("INSERT INTO requests VALUES (?, ?, ?)", (request, change, json.dumps(answer)))
        if not change % 1000:
            database.execute("DELETE FROM requests WHERE change <= ?", (change - REMEMBERED,))


def _state(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()[0])
