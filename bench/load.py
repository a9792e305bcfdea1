"""The load of the broker bench as a process that obeys lines: load.c, or load_python.py where there is no compiler.

Knows the templates that the load sends; not what is measured, nor which broker stands between.
"""

import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import zmq

from ..schema.codec import encode
from ..schema.message import Final, Hello, Message, Request

SERVICE = "bench"
DEADLINE_MS = 60_000
HOUR_MS = 3_600_000


class NoCompiler(Exception):
    """The C load cannot be built or run here; the message says why."""


class LoadFailed(Exception):
    """The load stopped; the message holds what it said last."""


class Tally(NamedTuple):
    """What became of the requests of one run.

    Attributes:
        sent, answered: requests sent, and those answered by a FINAL of the right id and size at the right client.
        served: requests that reached a worker.
        errors, gone, strays: ERRORs, GONEs, and messages that belong to no open request of that client.
        open: requests without any answer when the load gave up.
        seconds: from the first request to the last answer.
        note: text of the first ERROR or GONE.
    """

    sent: int
    answered: int
    served: int
    errors: int
    gone: int
    strays: int
    open: int
    seconds: float
    note: str

    @property
    def faults(self) -> int:
        return self.sent - self.answered + self.gone + self.strays

    @property
    def rate(self) -> float:
        """Round trips a second."""
        return self.answered / self.seconds if self.seconds else 0.0


def libzmq_path() -> str:
    """The shared libzmq that pyzmq has loaded into this process.

    Raises:
        NoCompiler: it is not a file of its own (pyzmq may hold it inside its extension module).
    """
    zmq.zmq_version_info()
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libzmq"):
            return path
    raise NoCompiler("this pyzmq has no libzmq in a file of its own")


def compiled() -> Path:
    """The C load's program, compiled at the first call on this machine and kept in the user's cache folder.

    Raises:
        NoCompiler: there is none, or it does not compile this source.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoCompiler("no C compiler (cc) was found")
    source = Path(__file__).with_name("load.c")
    name = hashlib.sha256(source.read_bytes() + platform.platform().encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ralmq"
    program = folder / f"load-{name}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / "load"
            command = [compiler, "-O2", "-o", str(target), str(source), "-ldl", "-lpthread"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise NoCompiler(f"{compiler} failed: {result.stderr.strip()[:300]}")
            target.replace(program)
    return program


def load_command(*, python: bool = False) -> list[str]:
    """How to start the load: in C, or in Python where asked.

    Raises:
        NoCompiler: the load in C is not to be had here.
    """
    if python:
        return [sys.executable, "-m", "ralmq.bench.load_python"]
    return [str(compiled()), libzmq_path()]


def _hello(number: int, *, worker: bool, capacity: int) -> Hello:
    name = f"bench-{'worker' if worker else 'client'}-{number}"
    nonce, pid = secrets.token_bytes(16), os.getpid()
    if not worker:
        return Hello(nonce, name, pid=pid)
    return Hello(nonce, name, pid=pid, services=(SERVICE,), capacity=capacity, idempotent=True, stall_ms=HOUR_MS)


def _frames(message: Message) -> list[bytes]:
    return [bytes(frame) for frame in encode(message, deadline=DEADLINE_MS if isinstance(message, Request) else 0)]


class Load:
    """A running load of some clients and workers, all in one process of their own.

    Args:
        command: from load_command().
        front, back: where the clients and where the workers connect.
        sizes: payloads in bytes; `run` names one by its place here. A payload travels as the codec lays it out:
            apart in a frame of its own, or within frame 0 where it is small.
        proxied: the broker knows no protocol: no HELLO, and workers see the asker's routing id.

    Raises:
        LoadFailed: the broker did not answer.
    """

    def __init__(
        self,
        command: Sequence[str],
        front: str,
        back: str,
        sizes: Sequence[int],
        *,
        clients: int = 4,
        workers: int = 4,
        proxied: bool = False,
    ) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.clients = clients
        lines = [f"front {front}", f"back {back}", f"greet {int(not proxied)}", f"envelope {int(proxied)}"]
        for number in range(clients + workers):
            worker = number >= clients
            hello = _hello(number, worker=worker, capacity=65_536)
            lines.append(f"{'worker' if worker else 'client'} {_frames(hello)[0].hex()}")
        for size in sizes:
            payload = [np.zeros(size, np.uint8)] if size else []
            asked, answer = _frames(Request(SERVICE, tensors=payload)), _frames(Final(tensors=payload))
            apart = sum(map(len, asked[1:]))
            lines.append(f"size {apart} {asked[0].hex()} {answer[0].hex()}")
        try:
            self._ask("\n".join([*lines, "start"]))
        except BaseException:
            self.close()
            raise

    def run(self, size: int, *, window: int, seconds: float = HOUR_MS / 1000, count: int = 0) -> Tally:
        """Keep `window` requests open at each client, for `seconds` or until `count` were sent; wait for all answers.

        Raises:
            LoadFailed: the load ended.
        """
        values = json.loads(self._ask(f"run {size} {window} {seconds} {count}"))
        return Tally(**values)

    def _ask(self, lines: str) -> str:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        answer = ""
        try:
            self.process.stdin.write(lines + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            raise LoadFailed(f"the load ended: {self.process.stderr.read().strip()[-500:] or 'without a word'}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
