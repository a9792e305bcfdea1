"""The further processes of a stage that computes with several ranks: started, joined, watched, ended.

Knows no layer. What a rank does is in rank.py; they all live on this machine and meet in a private folder.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from ...schema.errors import Refused, WorkerFailed
from ..engine.errors import RankLost
from ..engine.parallel import Group
from ..process import PARENT_PIPE

log = logging.getLogger("ralmq.stage")
FAILED = 1  # exit code of a rank
NOTICED = 1.0  # seconds after which the end of a process is known for sure
END = 5.0  # seconds that a rank has to end by itself


class Job(TypedDict):
    """What a rank is told first. `store` is the file where ranks meet; `options` are those of RankSpan.load."""

    rank: int
    size: int
    path: str
    first: int
    last: int
    device: str
    threads: int
    store: str
    options: dict[str, Any]


def device_of(device: str, rank: int) -> str:
    """Ranks take one device after the other: cuda:2 and the next ones; all of them the processor."""
    kind, _, number = device.partition(":")
    return device if kind == "cpu" else f"{kind}:{int(number or 0) + rank}"


def check_device(device: str, size: int = 1) -> None:
    """Refuses a device that is not there, or too few for `size` ranks, before anything is loaded."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError):  # torch's own word is long, and of its backends
            raise Refused(f"device={device} is none that torch can use here: give cpu, cuda or cuda:1") from None
        return
    if number and not number.isdecimal():
        raise Refused(f"device={device} is no device: give cpu, cuda or cuda:1")
    if not torch.cuda.is_available():
        why = "torch sees no CUDA device here" if torch.version.cuda else "the torch installed here has no CUDA"
        raise Refused(f"device={device} cannot be used: {why}; give device=cpu, or mend that")
    there, need = torch.cuda.device_count(), int(number or 0) + size
    if need > there:
        span = f"{kind}:{int(number or 0)} to {kind}:{need - 1}" if size > 1 else device
        raise Refused(
            f"device={device} cannot be used: {span} of {there} CUDA devices; give one of those, or device=cpu"
        )


def store_at(file: str, size: int) -> Any:
    """Where ranks meet: a file in a folder that nobody else may open, so that nothing waits for connections."""
    apart: Any = dist  # its stubs do not export stores
    return apart.FileStore(file, size)


class Ranks:
    """Ranks 1 to `size` - 1 of a span, each a process that ends with this one.

    Attributes:
        size: ranks in all, this process' own among them.
        lost: what became of one of them; empty while all is well.
    """

    def __init__(
        self, size: int, path: Path, first: int, last: int, device: str, threads: int, options: dict[str, Any]
    ) -> None:
        """Starts them; they load their parts while rank 0 loads its own."""
        self.lost = ""
        self.size = size
        self._closing = False
        self._gone = threading.Event()
        self._told: Callable[[str], object] = lambda said: None
        self._folder = tempfile.TemporaryDirectory(prefix="ralmq-ranks-")
        self._store = str(Path(self._folder.name) / "store")
        self._group: Group | None = None
        self._processes: list[subprocess.Popen[str]] = []
        self._watchers: list[threading.Thread] = []
        for rank in range(1, size):
            self._processes.append(_started())
            job = Job(
                rank=rank,
                size=size,
                path=str(path),
                first=first,
                last=last,
                device=device,
                threads=threads,
                store=self._store,
                options=options,
            )
            self._tell(rank, json.dumps(job))

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for process in self._processes]

    def join(self, device: str) -> Group:
        """Rank 0's end of their connections, once all have loaded and joined.

        Raises:
            Refused: one of them could not load its part.
            WorkerFailed: one of them ended.
        """
        for rank in range(1, self.size):
            self._heard(rank, "loaded")
        for rank in range(1, self.size):
            self._tell(rank, "join")
        for rank, process in enumerate(self._processes, 1):
            watcher = threading.Thread(target=self._await, args=(rank, process), name=f"rank-{rank}", daemon=True)
            self._watchers.append(watcher)
            watcher.start()
        try:
            group = self._met(device)
        except RankLost as error:
            raise WorkerFailed(self.lost or str(error)) from None
        for rank in range(1, self.size):
            self._heard(rank, "joined")
        self._folder.cleanup()  # nobody else will come
        self._group = group
        return group

    def _met(self, device: str) -> Group:
        """Waits in a thread, since no timeout fits all machines, and a rank may end meanwhile."""
        made: list[Group | RankLost] = []

        def meet() -> None:
            try:
                made.append(Group(0, self.size, store_at(self._store, self.size), torch.device(device)))
            except RankLost as error:
                made.append(error)

        thread = threading.Thread(target=meet, name="ranks-meet", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            if self.lost:
                raise RankLost(self.lost)
        if isinstance(made[0], RankLost):
            raise made[0]
        return made[0]

    def watch(self, lost: Callable[[str], object]) -> None:
        """Has `lost` called, from any thread, with what is to be said when a rank ends by itself."""
        self._told = lost
        if self.lost:
            lost(self.lost)

    def why(self, said: str) -> str:
        """What became of one of them, where that is the reason for what was said; connections end before processes."""
        self._gone.wait(NOTICED)
        return self.lost or said

    def close(self) -> None:
        """Ends them: their input ends. Calling it again does nothing."""
        self._closing = True
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()
        for process in self._processes:
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for watcher in self._watchers:
            watcher.join()
        if self._group is not None:
            self._group.close()
        self._folder.cleanup()

    def _await(self, rank: int, process: "subprocess.Popen[str]") -> None:
        code = process.wait()
        if not self._closing and not self.lost:
            how = f"was killed by signal {-code}" if code < 0 else f"ended ({code})"
            self.lost = f"rank {rank} of this stage {how}: the stage cannot compute without it, start it again"
            log.critical("%s", self.lost)
            self._gone.set()
            with suppress(RuntimeError):  # the event loop that is to be told is closed
                self._told(self.lost)

    def _tell(self, rank: int, line: str) -> None:
        stream = self._processes[rank - 1].stdin
        assert stream is not None
        with suppress(BrokenPipeError):  # it has ended: seen where it is listened to
            stream.write(line + "\n")
            stream.flush()

    def _heard(self, rank: int, what: str) -> None:
        stream = self._processes[rank - 1].stdout
        assert stream is not None
        line = stream.readline()
        if not line:
            raise WorkerFailed(f"rank {rank} of this stage ended before it had {what}: its log above has the reason")
        said = json.loads(line)
        if "error" in said:
            raise Refused(f"rank {rank}: {said['error']}")


def _started() -> "subprocess.Popen[str]":
    """In a session of its own, so that a Ctrl-C reaches the stage alone."""
    environment = {name: value for name, value in os.environ.items() if name != PARENT_PIPE}
    command = [sys.executable, "-m", f"{__package__}.rank"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True)
