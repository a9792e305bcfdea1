"""The directory of a text index: its manifest, what builds it, what opens its database. Knows SQLite's FTS5, no query.

`text.db` is what was built and never changes. The first change copies it to `live.db`, which is served from then on.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ..index.directory import OutputError, replacing, sync
from ..index.manifest import MANIFEST, FileRecord, ManifestError, record_file, valid_name
from ..index.progress import Progress, silent
from .passages import OVERLAP, WORDS, passages

FORMAT: Final = 1
BUILT: Final = "text.db"
LIVE: Final = "live.db"
OWN: Final = (MANIFEST, BUILT)  # never LIVE: a directory that has been changed is not replaced
PATIENCE: Final = 10.0  # seconds that a connection waits for another's lock
_AGAIN: Final = "build the index again with `ralmq index build --text`"
_MAX_BYTES: Final = 1 << 20
_SCHEMA: Final = (
    "CREATE VIRTUAL TABLE passages USING fts5(text, fields UNINDEXED, tokenize = 'unicode61 remove_diacritics 2')",
    "CREATE TABLE state (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class TextManifest:
    """What a text index says of itself: `ntotal` passages of `words` words, `overlap` of them shared."""

    name: str
    ntotal: int
    words: int
    overlap: int
    sources: tuple[str, ...]
    file: FileRecord  # of BUILT
    kind: str = "text"
    format: int = FORMAT


def build_text(
    out: Path,
    *,
    name: str,
    documents: Iterable[tuple[str, str]],
    words: int = WORDS,
    overlap: int = OVERLAP,
    sources: Sequence[str] = (),
    progress: Progress = silent,
) -> TextManifest:
    """Writes the directory `out`, atomically, from (name, text) pairs. Raises OutputError, OSError."""
    if not valid_name(name):
        raise OutputError(f"{name!r}: an index name is 1 to 64 letters, digits, '.', '_' or '-'; choose another")
    given = list(documents)
    with replacing(out, OWN) as fresh:
        with closing(_connect(f"{(fresh / BUILT).absolute().as_uri()}?mode=rwc")) as database:
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute("BEGIN")
            count = 0
            for number, (document, text) in enumerate(given):
                for passage in passages(text, words, overlap):
                    fields = json.dumps({"document": document, "start": passage.start}, ensure_ascii=False)
                    row = (count, passage.text, fields)
                    database.execute("INSERT INTO passages (rowid, text, fields) VALUES (?, ?, ?)", row)
                    count += 1
                progress("index", number + 1, len(given))
            if not count:
                raise OutputError("the sources hold no word; name others")
            state = [("next", count), ("changes", 0)]
            database.executemany("INSERT INTO state VALUES (?, ?)", state)
            database.execute("INSERT INTO passages (passages) VALUES ('optimize')")
            database.execute("COMMIT")
        return write_manifest(fresh, name, count, words, overlap, tuple(sources))


def write_manifest(
    directory: Path, name: str, count: int, words: int, overlap: int, sources: tuple[str, ...]
) -> TextManifest:
    """Of a directory that holds BUILT. Not atomic: the caller renames the directory."""
    manifest = TextManifest(name, count, words, overlap, sources, record_file(directory / BUILT))
    (directory / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    return manifest


def is_text(directory: Path) -> bool:
    """Whether the manifest of `directory` says that it is a text index; false for what is no index at all."""
    try:
        return bool(_raw(directory).get("kind") == "text")
    except ManifestError:
        return False


def read_text_manifest(directory: Path) -> TextManifest:
    """The manifest of `directory`, once the file it names has the size and sha256 it says. Raises ManifestError."""
    path = directory / MANIFEST
    raw = _raw(directory)
    if raw.get("kind") != "text" or raw.get("format") != FORMAT:
        raise ManifestError(f"{path}: is of no text index that this ralmq reads (format {FORMAT}); {_AGAIN}")
    try:
        manifest = TextManifest(**{**raw, "sources": tuple(raw["sources"]), "file": FileRecord(**raw["file"])})
        whole = (manifest.ntotal, manifest.words, manifest.overlap, manifest.file.bytes)
        if not valid_name(manifest.name) or not all(type(number) is int for number in whole):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise ManifestError(f"{path}: its fields are not those of a text index; {_AGAIN}") from None
    try:
        found = record_file(directory / BUILT)
    except OSError as fault:
        raise ManifestError(f"{directory / BUILT}: cannot be read ({fault.strerror}); {_AGAIN}") from None
    if found != manifest.file:
        raise ManifestError(
            f"{directory / BUILT}: its size or sha256 is not the manifest's, so it was changed or damaged; {_AGAIN}"
        )
    return manifest


def open_built(directory: Path) -> sqlite3.Connection:
    """Reads what was built, without any lock: nobody changes it."""
    return _connect(f"{(directory / BUILT).absolute().as_uri()}?mode=ro&immutable=1")


def open_live(directory: Path) -> sqlite3.Connection:
    """Reads and writes what has been changed since; a commit is on the disk when it returns."""
    database = _connect(f"{(directory / LIVE).absolute().as_uri()}?mode=rw")
    database.execute("PRAGMA synchronous = FULL")
    return database


def check_live(directory: Path, manifest: TextManifest) -> None:
    """Raises ManifestError for a LIVE file, where there is one, that does not stem from this build."""
    path = directory / LIVE
    if not path.exists():
        return
    try:
        with closing(open_live(directory)) as database:
            found = database.execute("SELECT value FROM state WHERE name = 'base'").fetchone()
    except sqlite3.Error as fault:
        raise ManifestError(
            f"{path}: cannot be read ({fault}); restore it, or move it away to serve the build"
        ) from None
    if found is None or found[0] != manifest.file.sha256:
        raise ManifestError(f"{path}: holds changes of another build; move it away to serve this one")


def begin_changes(directory: Path, manifest: TextManifest) -> None:
    """Makes LIVE of BUILT, whole or not at all; nothing where it is there already. Raises OSError."""
    if (directory / LIVE).exists():
        return
    work = Path(tempfile.mkdtemp(prefix=f".{LIVE}.", dir=directory))
    try:
        copy = work / LIVE
        shutil.copyfile(directory / BUILT, copy)
        with closing(open_live(work)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("INSERT OR REPLACE INTO state VALUES ('base', ?)", (manifest.file.sha256,))
        sync(copy)
        try:
            os.link(copy, directory / LIVE)
        except FileExistsError:
            return  # another server of the same directory was faster
        sync(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False)


def _raw(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ManifestError(f"{directory}: no such index directory; name one that `ralmq index build` wrote")
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
    except OSError as fault:
        raise ManifestError(f"{path}: cannot be read ({fault.strerror}); {_AGAIN}") from None
    except (ValueError, RecursionError):
        raise ManifestError(f"{path}: not valid JSON; {_AGAIN}") from None
    if not isinstance(found, dict):
        raise ManifestError(f"{path}: is no manifest; {_AGAIN}")
    return found
