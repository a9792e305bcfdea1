"""`--detach`, and a second `up` or `join`: what a command says to a supervisor that runs. Knows its record alone."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from ..schema.errors import RalmqError, Refused, WorkerFailed
from .failures import BAD_INPUT, PREFIX

if TYPE_CHECKING:
    from ..cluster.tasks import Task

SUPERVISOR_LOG: Final = "supervisor.log"
POLL: Final = 0.1


def detach(arguments: Sequence[str]) -> None:
    """Starts the same command in the background and waits until it is ready.

    Raises:
        Refused, WorkerFailed: it did not come up.
    """
    from ..cluster.child import last_line
    from ..cluster.record import running, state_directory

    directory = state_directory()
    found = running(directory)
    if found is not None:
        raise Refused(f"a cluster is up already at {found['url'] or 'its start'}: end it with `ralmq down`")
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / SUPERVISOR_LOG
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ralmq", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    shown = 0
    try:
        while process.poll() is None:
            record = running(directory)
            ready = record is not None and record["pid"] == process.pid and record["ready"]
            whole, newline, _ = log.read_bytes()[shown:].rpartition(b"\n")
            if newline:  # what it waits for is shown as soon as it says so
                shown += len(whole) + 1
                typer.echo(whole.decode(errors="replace"))
            if ready:
                return
            time.sleep(POLL)
    except BaseException:
        process.terminate()  # nobody would know of it
        raise
    raise _failure(process.returncode, last_line(log).removeprefix(PREFIX))


def clear_logs(directory: Path) -> None:
    """Those of the last cluster, without that of the supervisor, which may have begun this one."""
    for old in directory.glob("*.log"):
        if old.name != SUPERVISOR_LOG:
            old.unlink()


def joined(directory: Path, origin: str, wanted: Callable[[], "Sequence[Task]"]) -> bool:
    """Whether the cluster of that origin runs here already; what is new of it is added then, and told.

    Raises:
        Refused: another cluster runs here, or something cannot be added.
    """
    from ..cluster.record import running

    while (found := running(directory)) is not None and "origin" not in found and not found.get("ready"):
        time.sleep(POLL)  # it begins
    if found is None:
        return False
    if found.get("origin") != origin:
        raise Refused(f"a cluster is up already at {found['url'] or 'its start'}: end it with `ralmq down`")
    _add(directory, found, wanted())
    return True


def _add(directory: Path, found: Mapping[str, Any], wanted: "Sequence[Task]") -> None:
    from ..cluster.record import running
    from ..cluster.site import AGAIN, differing

    fresh, changed = differing(found, wanted)
    for name in changed:
        typer.echo(f"{name} goes on as it was started: `ralmq down` and a new start take what is changed of it")
    if not fresh:
        typer.echo(f"up at {found['url']}: {len(found.get('tasks', ()))} processes run, nothing is new")
        return
    os.kill(found["pid"], AGAIN)
    while (record := running(directory)) is not None:
        if record.get("turn", 0) > found.get("turn", 0):
            if record.get("fault"):
                raise Refused(record["fault"])
            typer.echo(f"added {', '.join(fresh)}")
            return
        time.sleep(POLL)
    raise WorkerFailed(f"the cluster ended meanwhile: see `ralmq logs`, and {directory / SUPERVISOR_LOG}")


def _failure(code: int, line: str) -> RalmqError:
    return Refused(line) if code == BAD_INPUT else WorkerFailed(f"the cluster did not come up: {line}")
