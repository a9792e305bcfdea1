"""Real processes and polls for tests: `python -m ralmq ...` started, stopped, killed. Knows no test."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ralmq.workers.process import PARENT_PIPE

PATIENCE = 30.0  # seconds after which a poll gives up; no test measures time by it


def free_url() -> str:
    """An address that nobody listens on now, below the ports that the kernel gives to outgoing connections.

    One of those could be taken by a client before its broker binds it; a client that tries it could even meet itself.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(10_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return f"tcp://127.0.0.1:{port}"


async def until(condition: Callable[[], Any], what: str = "it", within: float = PATIENCE) -> None:
    """Returns once `condition()`, plain or a coroutine function, is true.

    Raises:
        AssertionError: it did not come true in time.
    """
    end = time.monotonic() + within
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < end, f"{what} did not happen within {within:g} s"
        await asyncio.sleep(0.01)


class Process:
    """`python -m ralmq ARGUMENTS`, killed at the end of the `with` block however that is reached.

    Args:
        folder: where its log goes; also its current folder, so that `module:Class` finds modules there.
        inherit: the reading end of a pipe whose other end stands for the life of the parent.
    """

    def __init__(self, folder: Path, *arguments: str, inherit: int | None = None) -> None:
        self._inherit = inherit
        self._arguments = arguments
        self._folder = folder
        self._log = folder / f"{'-'.join(arguments[:2]).replace('/', '_').replace(':', '_')}-{id(self):x}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        pipe = {} if self._inherit is None else {PARENT_PIPE: str(self._inherit)}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ralmq", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **pipe},
                pass_fds=() if self._inherit is None else (self._inherit,),
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What it wrote so far, to stdout and stderr."""
        return self._log.read_text()

    def send(self, number: signal.Signals) -> None:
        """A signal, where it still runs."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)

    async def ended(self) -> int:
        """Its exit code, once it has ended."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, f"the end of {' '.join(self._arguments)}")
        return process.returncode


def broker(folder: Path, url: str) -> Process:
    return Process(folder, "broker", "--bind", url)


def worker(folder: Path, url: str, kind: str = "echo", **options: Any) -> Process:
    """A worker process; `options` become -o key=value."""
    pairs = [text for key, value in options.items() for text in ("-o", f"{key}={value}")]
    return Process(folder, "worker", kind, "--broker", url, *pairs)
