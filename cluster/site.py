"""What one machine runs of a cluster file: started, added to, told to the broker. Knows tasks; not what they serve."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from ..client.client import connect
from ..schema.errors import RalmqError, Refused
from ..schema.keys import CLUSTER
from .child import BAD_INPUT
from .cluster import PATIENCE, POLL, Cluster
from .record import write
from .supervise import supervise
from .tasks import Task, task_of

PUBLISH: Final = f"{CLUSTER}.publish"
DEADLINE: Final = 10.0
LOOK: Final = 0.5  # seconds between two looks whether all layers are there
SOON: Final = 5.0  # seconds after which a broker that has just been started must have been told the file
AGAIN: Final = signal.SIGUSR1  # asks a supervisor to look whether there is more to start

Wanted = Callable[[], Awaitable[tuple[list[Task], Mapping[str, Any]]]]
"""What this machine is to run, and what the others are (for the broker; empty where it is not ours to say)."""


class Site:
    """The processes of one machine.

    Args:
        wanted: asked at the start, and on SIGUSR1 again: what is new is started, nothing else changes.
        origin: the file, or the broker, that says what runs here.
        alone: no other machine belongs to the cluster, so that every model has its pipeline here.
        told: gets a line for whatever happens later.
    """

    def __init__(
        self, cluster: Cluster, wanted: Wanted, *, origin: str, alone: bool, told: Callable[[str], None]
    ) -> None:
        self.cluster = cluster
        self.origin = origin
        self._wanted = wanted
        self._alone = alone
        self._told = told
        self._tasks: dict[str, Task] = {}
        self._ready = False
        self._fault = ""
        self._turn = 0  # how often it was asked for more
        self._machines: Mapping[str, Any] = {}
        self._publishing = asyncio.Event()

    async def run(self, shown: Callable[[dict[str, Any]], None]) -> None:
        """Until it is cancelled; `shown` gets the status once everything serves.

        Raises:
            Refused, WorkerFailed, DeadlineExceeded: it cannot start.
        """
        loop = asyncio.get_running_loop()
        more = asyncio.Event()
        loop.add_signal_handler(AGAIN, more.set)
        try:
            self.record()
            status = await self._add()
            self.record()  # who hears that it is ready may look at what runs
            shown(status)
            self._ready = True  # who waits for that takes what was said
            self.record()
            jobs = [supervise(self.cluster, self._told, self._changed), self._grow(more), self._publish()]
            if self.cluster.lacking(status):
                jobs.append(self._complete())
            await _first_end([loop.create_task(job) for job in jobs])
        finally:
            loop.remove_signal_handler(AGAIN)

    def record(self) -> None:
        """Writes what runs, for `ralmq status`, `down`, `logs` and a second `up`."""
        children = self.cluster.children.values()
        processes = [{"name": child.name, "pid": child.pid, "log": str(child.log)} for child in children]
        tasks = [task.as_map() for task in self._tasks.values() if self._runs(task)]
        found = {"pid": os.getpid(), "url": self.cluster.url, "ready": self._ready, "processes": processes}
        write(
            self.cluster.directory,
            {**found, "origin": self.origin, "tasks": tasks, "turn": self._turn, "fault": self._fault},
        )

    # -- inside

    def _changed(self) -> None:
        self.record()
        self._publishing.set()  # it may have been the broker

    async def _add(self) -> dict[str, Any]:
        """Starts what is wanted and not there yet."""
        tasks, self._machines = await self._wanted()
        fresh = [task for task in tasks if not self._runs(task)]
        for task in fresh:
            await self.cluster.spawn(task.worker, *task.flags, name=task.name, threads=task.threads, waits=task.waits)
            self._tasks[task.name] = task
        await self._say()  # before the wait: stages of other machines may have to join first
        names = [task.name for task in fresh]
        return await self.cluster.ready(only=names or ["broker"], pipelines=self._alone, told=self._told)

    def _runs(self, task: Task) -> bool:
        """Or is started again by the supervisor: not what ended because its input is to be mended."""
        return task.name in self._tasks and self.cluster.children[task.name].code != BAD_INPUT

    async def _grow(self, more: asyncio.Event) -> None:
        while True:
            await more.wait()
            more.clear()
            self._fault = ""
            try:
                await self._add()
            except RalmqError as error:
                self._fault = error.message
                self._tell(f"nothing was added: {error.message}")
            self._turn += 1
            with contextlib.suppress(OSError):
                self.record()

    async def _complete(self) -> None:
        """Says when what waited for other machines serves; endless, as the other jobs."""
        async with connect(self.cluster.url, wait=float("inf"), name="supervisor") as client:
            while True:
                await asyncio.sleep(LOOK)
                with contextlib.suppress(RalmqError):  # the broker may be away
                    if not self.cluster.lacking(await client.status(deadline=DEADLINE)):
                        break
        self._tell(f"ready at {self.cluster.url}: all layers are there")
        await asyncio.Event().wait()

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; what runs goes on
            self._told(line)

    async def _publish(self) -> None:
        """Tells a broker that was started anew what it has forgotten."""
        while True:
            await self._publishing.wait()
            self._publishing.clear()
            try:
                await self._say()
            except RalmqError as error:
                self._tell(f"the broker does not take the cluster's plan: {error.message}")

    async def _say(self) -> None:
        if self._machines:
            async with connect(self.cluster.url, wait=DEADLINE, name="supervisor") as client:
                await client.request(PUBLISH, {"machines": dict(self._machines)}, deadline=DEADLINE)


async def _first_end(jobs: Sequence["asyncio.Task[None]"]) -> None:
    """Waits until one of several endless jobs fails, and ends the others."""
    try:
        done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
        for job in done:
            job.result()
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


async def asked(url: str, machine: str, wait: float, told: Callable[[str], None] = lambda line: None) -> list[Task]:
    """What the broker's plan has for a machine; see `task_of` for what is not taken.

    Args:
        told: hears what is waited for, where that takes long.

    Raises:
        NoBroker: it cannot be reached.
        Refused: the broker knows no cluster file, or none of its machines is called so.
    """
    names: list[str] = []
    line = f"waiting: the broker at {url} has not answered: is it started, and is that its address?"
    slow = asyncio.get_running_loop().call_later(PATIENCE, told, line)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(slow.cancel)
        client = await stack.enter_async_context(connect(url, wait=wait, name="join"))
        slow.cancel()
        end = time.monotonic() + SOON
        while True:
            answer = (await client.request(CLUSTER, {"machine": machine}, deadline=DEADLINE)).body
            names = [str(name) for name in answer.get("machines") or ()]
            if names or time.monotonic() > end:
                break
            await asyncio.sleep(POLL)
    if not names:
        raise Refused(
            f"the broker at {url} has no cluster file: start it with `ralmq up FILE`, or join with --model DIR"
        )
    starts = answer.get("starts")
    if starts is None:
        raise Refused(f"the cluster file has no machine {machine}: say --machine with one of {', '.join(names)}")
    return [task_of(entry) for entry in starts]


def differing(record: Mapping[str, Any], tasks: Sequence[Task]) -> tuple[list[str], list[str]]:
    """Of what is wanted: names that do not run yet, and names that run otherwise."""
    running = {entry["name"]: entry for entry in record.get("tasks", ())}
    fresh = [task.name for task in tasks if task.name not in running]
    return fresh, [task.name for task in tasks if task.name in running and running[task.name] != task.as_map()]
