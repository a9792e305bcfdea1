"""What a broker costs that has nothing to do."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import ralmq
from checks import Line, check
from serving import broker, free_url, until, worker

SECONDS = 10.0
BOUND = 0.02


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@check
async def idle(folder: Path) -> AsyncIterator[Line]:
    url = free_url()
    async with AsyncExitStack() as stack:
        serving = stack.enter_context(broker(folder, url))
        workers = [stack.enter_context(worker(folder, url)) for _ in range(2)]
        clients = [await stack.enter_async_context(ralmq.connect(url, wait=20)) for _ in range(3)]

        async def all_there() -> bool:
            return len((await clients[0].status())["workers"]) == 2

        await until(all_there)
        before = [cpu(process.pid) for process in (serving, *workers)]
        start = time.monotonic()
        await asyncio.sleep(SECONDS)
        seconds = time.monotonic() - start
        found = [(cpu(process.pid) - used) / seconds for process, used in zip((serving, *workers), before, strict=True)]
    for what, used in zip(("broker", "echo worker", "echo worker"), found, strict=True):
        yield Line(f"idle CPU of a {what}, 2 workers and 3 clients", f"< {BOUND:.0%}", f"{used:.2%}", used < BOUND)
