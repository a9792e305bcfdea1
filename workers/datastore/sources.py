"""Files and folders a user names into documents. Knows text files alone: no token, no index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...schema.errors import Refused

SUFFIXES = (".md", ".py", ".rst", ".txt")


class SourceError(Refused, ValueError):
    """A source that gives no document; one line that names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text under the name it is shown by."""

    name: str
    text: str


class Reading(NamedTuple):
    """Documents in a fixed order, and the names of files left out because they are not UTF-8 or not readable."""

    documents: list[Document]
    skipped: list[str]


def read_documents(paths: Sequence[Path]) -> Reading:
    """Every non-empty .txt, .md, .rst and .py file of `paths`, folders walked in sorted order, hidden entries left out.

    Raises SourceError for a path that is missing or of another kind, and for one that gives no document at all.
    """
    documents: list[Document] = []
    skipped: list[str] = []
    for path in paths:
        before = len(documents)
        for name, file in _files(path):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                skipped.append(name)
                continue
            if text.strip():
                documents.append(Document(name, text))
        if len(documents) == before:
            raise SourceError(
                f"{path}: holds no readable {', '.join(SUFFIXES)} file with text in it; name another source"
            )
    if not documents:
        raise SourceError("no source given; name at least one file or folder")
    return Reading(documents, skipped)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """(name to show, file) of one source."""
    if path.is_dir():
        base = path.resolve()
        for folder, folders, files in os.walk(base):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
            for file in sorted(files):
                if file.endswith(SUFFIXES) and not file.startswith("."):
                    full = Path(folder) / file
                    yield f"{base.name}/{full.relative_to(base).as_posix()}", full
    elif not path.exists():
        raise SourceError(f"{path}: no such file or folder; name one that exists")
    elif path.suffix not in SUFFIXES or not path.is_file():
        raise SourceError(f"{path}: is no {', '.join(SUFFIXES)} file; name one of these or a folder")
    else:
        yield path.name, path
