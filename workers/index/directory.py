"""Writing a directory so that nobody ever sees half of it. Knows nothing of what is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...schema.errors import Refused


class OutputError(Refused, ValueError):
    """A place where no index can be written; one line that says which and what to do."""


def check_replaceable(out: Path, own: Collection[str]) -> None:
    """Raises OutputError unless `out` is absent or a directory that holds nothing but files named in `own`.

    Replacing deletes the old directory, so one with anything else in it is the user's, not ours.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: is not a plain directory; choose another --out")
    foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in own) if out.exists() else []
    if foreign:
        raise OutputError(f"{out}: holds files that are no part of an index ({foreign[0]}); choose another --out")


@contextmanager
def replacing(out: Path, own: Collection[str]) -> Iterator[Path]:
    """Yields an empty directory beside `out`; when the block ends it is on the disk and takes the place of `out`.

    If anything raises, cancellation and Ctrl-C included, the new directory is removed and `out` is as it was. Between
    the two renames that replace an old directory there is no `out`, but never half of one. Raises OutputError, OSError.
    """
    out = out.absolute()
    check_replaceable(out, own)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            _sync(path)
        _swap(fresh, out, work / "old")
        _sync(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(fresh: Path, out: Path, aside: Path) -> None:
    old = out.exists()
    if old:
        os.rename(out, aside)
    try:
        os.rename(fresh, out)
    except BaseException:
        if old:
            os.rename(aside, out)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
