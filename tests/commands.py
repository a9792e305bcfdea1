"""The command as a user runs it: a process of its own, in any folder. Waits are for an event, with a bound."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
RALMQ = (sys.executable, "-m", "ralmq")
WITHIN = 60.0  # seconds: a bound for a broken program, not a measure


def ralmq(
    *arguments: str, home: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `ralmq ARGUMENTS` in `home`, its state there too, until it ends."""
    return subprocess.run(
        [*RALMQ, *arguments], cwd=home, env=env_of(home, environment), capture_output=True, text=True, timeout=WITHIN
    )


@contextmanager
def started(
    *arguments: str, home: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`ralmq ARGUMENTS` in the background; what it writes is in home/out. Ended with the block."""
    with (home / "out").open("w") as out:
        process = subprocess.Popen(
            [*RALMQ, *arguments], cwd=home, env=env_of(home, environment), stdout=out, stderr=out, text=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@contextmanager
def broker(home: Path) -> Iterator[str]:
    """`ralmq broker` on a free port; gives its address."""
    with started("broker", "--bind", "tcp://127.0.0.1:*", home=home):
        yield eventually(lambda: bound_address(home))


def env_of(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RALMQ_")}
    return {**kept, "XDG_STATE_HOME": str(home / "state"), "COLUMNS": "200", **(more or {})}


def eventually(what: Callable[[], T | None], within: float = WITHIN) -> T:
    """The first true value of `what`, asked again and again."""
    end = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < end, f"never true: {what}"
        time.sleep(0.02)
    return found


def bound_address(home: Path) -> str | None:
    """What a broker started in `home` said of its address."""
    said = (home / "out").read_text()
    return next((line.split()[-1] for line in said.splitlines() if line.startswith("broker at ")), None)


def runs(pid: int) -> bool:
    """Whether the process lives; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
