"""The brokers that are compared, each a process with its load connected, and the CPU time that they use (Linux).

Knows how they are started; nothing of what they do inside.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ..cluster.child import Lifeline
from ..workers.process import PARENT_PIPE
from .load import Load, LoadFailed

RALMQ, PROXY, ASYNCIO, POLLED = "ralmq", "zmq.proxy in C", "zmq.asyncio", "zmq.asyncio + Poller"
BROKER = (sys.executable, "-m", "ralmq", "broker", "--bind")
BASELINES = Path(__file__).resolve().parents[1] / "tests" / "baselines"
TICKS = os.sysconf("SC_CLK_TCK")


class Cpu(NamedTuple):
    """CPU seconds of a process: its main thread, and all its other threads (libzmq's I/O)."""

    main: float
    others: float

    def __sub__(self, earlier: "Cpu") -> "Cpu":
        return Cpu(self.main - earlier.main, self.others - earlier.others)


def _seconds(path: str) -> float:
    fields = Path(path).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime and stime, the 14th and 15th of the whole line


def cpu_of(pid: int) -> Cpu:
    main = _seconds(f"/proc/{pid}/task/{pid}/stat")
    return Cpu(main, _seconds(f"/proc/{pid}/stat") - main)


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used, over all cores."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / TICKS  # all but idle and waiting for a disk


def free_url() -> str:
    """A loopback address whose port nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


class System:
    """One broker that runs, with its load connected to it.

    Args:
        name: RALMQ, PROXY, ASYNCIO or POLLED.
        command: how the broker is started; addresses are appended, two for PROXY.
        load: how the load is started, from load_command().
        sizes: payloads in bytes.

    Raises:
        LoadFailed: the broker did not come up; the message holds what it said last.
    """

    def __init__(self, name: str, command: Sequence[str], load: Sequence[str], sizes: Sequence[int]) -> None:
        self.name = name
        front = free_url()
        back = free_url() if name == PROXY else front
        addresses = dict.fromkeys((front, back))
        self._stack = ExitStack()
        self._said = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
        lifeline = Lifeline()
        self._stack.callback(lifeline.close)
        self.process = subprocess.Popen(
            [*command, *addresses],
            stdout=self._said,
            stderr=self._said,
            env={**os.environ, PARENT_PIPE: str(lifeline.reading)},
            pass_fds=(lifeline.reading,),
        )
        self._stack.callback(self._stop)
        try:
            self.load = self._stack.enter_context(Load(load, front, back, sizes, proxied=name == PROXY))
        except LoadFailed as error:
            self._said.seek(0)
            last = self._said.read().decode(errors="replace").strip()[-500:]
            self._stack.close()
            raise LoadFailed(f"{name}: {error}" + (f"; the broker said: {last}" if last else "")) from None
        except BaseException:
            self._stack.close()
            raise

    def cpu(self) -> Cpu:
        return cpu_of(self.process.pid)

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def commands(broker: Sequence[str] = BROKER, baselines: Path = BASELINES) -> dict[str, list[str]]:
    """How each system is started; the baselines are there in a checkout of the sources only."""
    found = {RALMQ: list(broker)}
    plain = baselines / "plain_asyncio.py"
    for name, file, more in ((PROXY, baselines / "proxy.py", ()), (ASYNCIO, plain, ()), (POLLED, plain, ("--poller",))):
        if file.exists():
            found[name] = [sys.executable, str(file), *more]
    return found
