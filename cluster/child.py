"""One process of a cluster: started, watched, ended. Knows its log and its exit code; not what it serves."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..schema.errors import RalmqError, Refused, WorkerFailed
from ..workers.process import PARENT_PIPE

BAD_INPUT: Final = 2  # exit code of a command whose input is to be mended; its last line says which
TAIL: Final = 4096  # bytes of a log that are searched for its last line


class Lifeline:
    """A pipe that children hold the reading end of: they stop when this process is gone, however it went."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe()

    def close(self) -> None:
        os.close(self.reading)
        os.close(self._writing)


class Child:
    """`python -m ralmq ARGUMENTS` in a session of its own, so that a Ctrl-C reaches the supervisor alone.

    Attributes:
        name: within its cluster.
        log: file that takes what it writes to stdout and stderr.
        threads: its OMP_NUM_THREADS.
        asked: whether it was asked to end.
        label: beginning of the name that its worker gives itself, where pids do not tell it from others.
        waits: for other machines, before it serves.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, threads: int = 1, *, label: str = "", waits: bool = False
    ) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.log = log
        self.threads = threads
        self.asked = False
        self.label = label
        self.waits = waits
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, lifeline: Lifeline, again: bool = False) -> None:
        """Starts it; `again` writes on behind what an earlier one wrote to its log."""
        with self.log.open("ab" if again else "wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ralmq",
                *self.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads), PARENT_PIPE: str(lifeline.reading)},
                pass_fds=(lifeline.reading,),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def code(self) -> int | None:
        """Exit code; negative for a signal; None while it runs."""
        return self._process.returncode if self._process is not None else None

    async def wait(self) -> None:
        """Returns when it has ended."""
        if self._process is not None:
            await self._process.wait()

    def terminate(self) -> None:
        """Asks it to end in order."""
        self.asked = True
        if self._process is not None and self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        self.asked = True
        if self._process is not None and self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def failure(self) -> RalmqError:
        """Why it ended by itself: Refused where its input is to be mended, else WorkerFailed."""
        line = last_line(self.log)
        if self.code == BAD_INPUT:
            return Refused(line.removeprefix("ralmq: "))
        if self.code == 0:  # its last line says what it did, not why it ended
            return WorkerFailed(f"{self.name} ended in order, asked by a signal or `ralmq drain` (log: {self.log})")
        how = (
            f"was killed by signal {-self.code}" if self.code is not None and self.code < 0 else f"ended ({self.code})"
        )
        return WorkerFailed(f"{self.name} {how}{': ' if line else ''}{line} (log: {self.log})")


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
