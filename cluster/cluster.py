"""A broker and workers as processes of this machine: ready when the broker says so, ended in order.

Knows processes and `ralmq.status`; not what a worker does.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ..client.client import connect
from ..schema.errors import DeadlineExceeded, Refused
from ..workers.host import CLEAN_UP, DRAIN
from .addresses import from_elsewhere, from_here
from .child import Child, Lifeline

LOOPBACK: Final = "tcp://127.0.0.1:*"  # any free port
STARTED: Final = "broker at "  # what a broker says once it is bound, followed by its address
POLL: Final = 0.05
PATIENCE: Final = 3.0  # seconds after which it is said what is waited for
LONGEST: Final = 120  # characters of a worker's name without its suffix
READY_WITHIN: Final = 600.0  # a large model takes long to load; a process that fails ends the wait at once
GRACE: Final = DRAIN + 2 * CLEAN_UP  # seconds that a process has for its drain


class Cluster:
    """Processes that live as long as the `async with` block, and never longer than this process.

    Args:
        directory: for one log a process; made where it is missing.
        bind: the broker's address.
        join: address of a broker that runs elsewhere: none is started.
        site: of several machines, the name of this one; `ralmq status` shows NAME@SITE.
        outside: where other machines reach the broker, when that is known.
        threads: OMP_NUM_THREADS of each process that is not told otherwise.

    Attributes:
        url: where the broker is reached from here, its port filled in.
        outside: the same for other machines.
        children: by name, ended ones included.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bind: str = LOOPBACK,
        insecure: bool = False,
        threads: int = 1,
        join: str = "",
        site: str = "",
        outside: str = "",
    ) -> None:
        self.directory = directory
        self.url = join
        self.outside = outside or join
        self.site = site
        self.children: dict[str, Child] = {}
        self._bind = bind
        self._insecure = insecure
        self._threads = threads
        self._ended: asyncio.Queue[Child] = asyncio.Queue()
        self._watchers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lifeline = Lifeline()
        if self.url:
            return self
        try:
            flags = ["--insecure"] if self._insecure else []
            broker = await self._start("broker", ["broker", "--bind", self._bind, *flags], self._threads)
            self._bound = await _address(broker)
        except BaseException:
            await self.stop()
            raise
        self.url = from_here(self._bound)
        self.outside = self.outside or from_elsewhere(self._bound)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def spawn(
        self, worker: str, *arguments: str, name: str = "", threads: int | None = None, waits: bool = False
    ) -> Child:
        """Starts `ralmq worker WORKER ARGUMENTS` on this broker; `ready` tells when it serves.

        Args:
            worker: built-in name or module:Class.
            arguments: such as "-o", "key=value".
            name: of the process; by default the worker's, with a number where there are several.
            waits: it may wait for other machines before it serves: `ready` does not wait for it.
        """
        name = name or self._free_name(worker.rpartition(":")[2].lower())
        label = f"{name}@{self.site}"[:LONGEST] if self.site else ""
        line = ["worker", worker, "--broker", self.url, *(["--name", label] if label else []), *arguments]
        return await self._start(name, line, threads or self._threads, label, waits)

    async def restart(self, name: str) -> Child:
        """Starts a process that has ended with the same command again; a broker takes the address that it had."""
        old = self.children[name]
        arguments = list(old.arguments)
        if name == "broker":
            arguments = [self._bound if argument == self._bind else argument for argument in arguments]
        return await self._start(name, arguments, old.threads, old.label, old.waits)

    async def ready(
        self,
        within: float = READY_WITHIN,
        *,
        only: Collection[str] = (),
        pipelines: bool = True,
        told: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """Waits until every worker is known to the broker and every model has its pipeline. Returns the status.

        Args:
            only: these processes; all where none is named.
            pipelines: False where other machines hold layers.
            told: hears what is waited for, where that takes long.

        Raises:
            Refused: a process ended because its input is to be mended.
            WorkerFailed: a process ended otherwise.
            DeadlineExceeded: it took longer; the message names what is missing.
        """
        missing = f"the broker at {self.url} has not answered: is it started, and is that its address?"
        slow = asyncio.get_running_loop().call_later(PATIENCE, lambda: told(f"waiting: {missing}"))
        try:
            async with asyncio.timeout(within), connect(self.url, wait=within, name="supervisor") as client:
                while True:
                    self._check(only)
                    with contextlib.suppress(DeadlineExceeded):
                        status = await client.status(deadline=1.0)
                        missing = self._missing(status, only, pipelines)
                        if not missing:
                            return status
                    await asyncio.sleep(POLL)
        except TimeoutError:
            text = f"not ready after {within:g} s: {missing}; see the logs in {self.directory}"
            raise DeadlineExceeded(text) from None
        finally:
            slow.cancel()

    def lacking(self, status: dict[str, Any]) -> list[str]:
        """What does not serve yet, since it waits for other machines; `ready` does not wait for that."""
        waiting = [child for child in self._chosen(()) if child.waits and not _announced(child, status)]
        unformed = [line for line in status["pipelines"] if not line["formed"]]
        return [
            *(f"{child.name} waits for its layers" for child in waiting),
            *(f"{line['model']} lacks layers {line['missing']}" for line in unformed),
        ]

    async def ended(self) -> Child:
        """The next process that ends without being asked to."""
        return await self._ended.get()

    async def stop(self, *names: str) -> None:
        """Ends the processes named, or all, the broker last: SIGTERM, and SIGKILL after a grace."""
        chosen = [self.children[name] for name in names or self.children]
        try:
            await _end(child for child in chosen if child.name != "broker")
            await _end(child for child in chosen if child.name == "broker")
        finally:
            for child in chosen:
                child.kill()
            if not names:
                self._lifeline.close()
                for watcher in self._watchers:
                    watcher.cancel()

    # -- inside

    async def _start(
        self, name: str, arguments: list[str], threads: int, label: str = "", waits: bool = False
    ) -> Child:
        if name in self.children and self.children[name].code is None:
            raise Refused(f"a process called {name} runs in this cluster: give another name")
        child = Child(name, arguments, self.directory / f"{name}.log", threads, label=label, waits=waits)
        await child.start(self._lifeline, again=name in self.children)
        self.children[name] = child
        watcher = asyncio.create_task(self._watch(child))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)
        return child

    async def _watch(self, child: Child) -> None:
        await child.wait()
        if not child.asked:
            self._ended.put_nowait(child)

    def _free_name(self, base: str) -> str:
        number = 0
        while (name := f"{base}-{number}" if number else base) in self.children:
            number += 1
        return name

    def _chosen(self, only: Collection[str]) -> list[Child]:
        return [child for name, child in self.children.items() if not child.asked and (not only or name in only)]

    def _check(self, only: Collection[str]) -> None:
        for child in self._chosen(only):
            if child.code is not None:
                raise child.failure()

    def _missing(self, status: dict[str, Any], only: Collection[str], pipelines: bool) -> str:
        silent = [
            child.name
            for child in self._chosen(only)
            if child.name != "broker" and not child.waits and not _announced(child, status)
        ]
        if silent:
            return f"{', '.join(silent)} not announced yet"
        lines = status["pipelines"] if pipelines else ()
        return ", ".join(f"{line['model']} lacks layers {line['missing']}" for line in lines if not line["formed"])


def _announced(child: Child, status: dict[str, Any]) -> bool:
    if child.label:  # pids of other machines may be the same
        return any(worker["name"].rpartition("-")[0] == child.label for worker in status["workers"])
    return any(worker["pid"] == child.pid for worker in status["workers"])


async def _address(broker: Child) -> str:
    """What a broker that was just started says of itself.

    Raises:
        Refused, WorkerFailed: it ended.
    """
    while True:
        for line in broker.log.read_text(errors="replace").splitlines():
            if line.startswith(STARTED):
                return line.removeprefix(STARTED)
        if broker.code is not None:
            raise broker.failure()
        await asyncio.sleep(POLL)


async def _end(children: Iterable[Child]) -> None:
    running = [child for child in children if child.code is None]
    for child in running:
        child.terminate()
    waits = [asyncio.ensure_future(child.wait()) for child in running]
    if waits:
        try:
            await asyncio.wait(waits, timeout=GRACE)
        finally:  # also when a second Ctrl-C comes
            for child in running:
                child.kill()
        await asyncio.wait(waits)
