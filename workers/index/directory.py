"""Writing a directory so that nobody ever sees half of it. Knows nothing of what is written."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...schema.errors import Refused

_SHARD = re.compile(r"shard-\d+")


class OutputError(Refused, ValueError):
    """A place where no index can be written; one line that says which and what to do."""


def check_replaceable(out: Path, own: Collection[str]) -> None:
    """Raises OutputError unless `out` is absent or a directory that holds nothing but files named in `own`.

    Folders shard-0, shard-1 ... may be there that hold nothing else. Replacing deletes the old directory, so one with
    anything else in it is the user's, not ours.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: is not a plain directory; choose another --out")
    foreign = sorted(_foreign(out, own)) if out.exists() else []
    if foreign:
        raise OutputError(f"{out}: holds files that are no part of an index ({foreign[0]}); choose another --out")


def check_place(out: Path, own: Collection[str]) -> None:
    """As `check_replaceable`, and that files can be written there: for what takes long before its first one."""
    check_replaceable(out, own)
    near = out.absolute().parent
    while not near.exists() and near != near.parent:
        near = near.parent
    try:
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=near).cleanup()
    except OSError as fault:
        raise _unwritable(out, near, fault) from None


def _unwritable(out: Path, place: Path, fault: OSError) -> OutputError:
    return OutputError(f"{out}: nothing can be written to {place} ({fault.strerror}); choose another --out")


def shard_name(shard: int) -> str:
    """The folder of a shard within the directory of its index."""
    return f"shard-{shard}"


def _foreign(out: Path, own: Collection[str], deeper: bool = True) -> Iterator[str]:
    for entry in out.iterdir():
        if deeper and _SHARD.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            for name in _foreign(entry, own, False):
                yield f"{entry.name}/{name}"
        elif entry.name not in own:
            yield entry.name


@contextmanager
def replacing(out: Path, own: Collection[str]) -> Iterator[Path]:
    """Yields an empty directory beside `out`; when the block ends it is on the disk and takes the place of `out`.

    If anything raises, cancellation and Ctrl-C included, the new directory is removed and `out` is as it was. Between
    the two renames that replace an old directory there is no `out`, but never half of one. Raises OutputError, OSError.
    """
    out = out.absolute()
    check_replaceable(out, own)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as fault:
        raise _unwritable(out, out.parent, fault) from None
    try:
        fresh = work / "new"
        fresh.mkdir()
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        _swap(fresh, out, work / "old")
        sync(out.parent)
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


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
