"""The cluster of `ralmq up` as other commands find it: a folder with a record, a lock and logs. Starts nothing.

The supervisor holds the lock as long as it lives, so a record whose lock is free is stale, whatever its pids say.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from ..schema.errors import Refused

RECORD: Final = "cluster.json"
LOCK: Final = "lock"
TRIES: Final = 10  # a command that looks whether the lock is free holds it for an instant


def state_directory() -> Path:
    """$XDG_STATE_HOME/ralmq/local, by default under ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "ralmq" / "local"


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Takes the place of the one cluster of `directory`; its record is gone at the end.

    Raises:
        Refused: a cluster is up there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a") as lock:
        tries = TRIES
        while not _taken(lock):
            if tries := tries - 1:
                time.sleep(0.02)
                continue
            found = _read(directory)
            raise Refused(f"a cluster is up already at {found.get('url') or 'its start'}: end it with `ralmq down`")
        write(directory, {"pid": os.getpid(), "url": "", "ready": False, "processes": []})
        try:
            yield
        finally:
            (directory / RECORD).unlink(missing_ok=True)


def write(directory: Path, record: dict[str, Any]) -> None:
    """Replaces the record at once, so that a reader never sees half of it."""
    fresh = directory / f"{RECORD}.new"
    fresh.write_text(json.dumps(record, indent=1) + "\n")
    fresh.replace(directory / RECORD)


def running(directory: Path) -> dict[str, Any] | None:
    """The record of the cluster that is up: pid of its supervisor, url, ready, processes (name, pid, log); or None."""
    try:
        with (directory / LOCK).open("a") as lock:
            if _taken(lock):
                (directory / RECORD).unlink(missing_ok=True)  # left by a supervisor that was killed
                return None
    except FileNotFoundError:
        return None
    return _read(directory) or None


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / RECORD).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
