"""A worker that holds the interpreter for 5 s at beats of 1 s: it is busy, not dead, and its request is served once."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import ralmq
from checks import Line, counted, size
from serving import Process, broker, free_url, until

SECONDS = 5.0
HERE = Path(__file__).parent


@counted
async def interpreter_held(folder: Path) -> AsyncIterator[Line]:
    """Two workers of one service, so that the request could go to the other."""
    turns = size(4, 1)
    for module in ("faulty_workers.py", "sleepy_stage.py"):
        shutil.copy(HERE / module, folder)
    url = free_url()
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for _ in range(2):
            stack.enter_context(Process(folder, "worker", "faulty_workers:Holding", "--broker", url))
        async with ralmq.connect(url, wait=30) as client:

            async def both() -> bool:
                return len((await client.status())["workers"]) == 2

            await until(both)
            first = await client.status()
            names = sorted(entry["name"] for entry in first["workers"])
            held, attempts, seen = [], [], []
            for _ in range(turns):
                asked = asyncio.create_task(client.request("hold", {"seconds": SECONDS}, deadline=120))
                while not asked.done():
                    await asyncio.sleep(0.2)
                    seen.append(await client.status())
                reply = await asked
                held.append(reply.body["held"])
                attempts.append(reply.body["attempt"])
            last = await client.status()
    executions = (folder / "executions").read_text().splitlines()
    known = sum(sorted(entry["name"] for entry in status["workers"]) == names for status in seen)
    counts = last["broker"]["counts"]
    trouble = {name: counts[name] for name in ("requeued", "worker_lost", "unlisted", "duplicates") if counts.get(name)}
    same = first["broker"]["epoch"] == last["broker"]["epoch"]
    yield Line(
        f"a worker that lets no other thread of it run for {SECONDS:g} s, at beats of 1 s: expired",
        "never; the same two workers in each status",
        f"{len(last['lost'])} lost, the same in {known} of {len(seen)}; held for {min(held):.1f} to {max(held):.1f} s",
        not last["lost"] and known == len(seen) and min(held) >= SECONDS,
    )
    yield Line(
        "the same: executions of each request, attempts, epoch of the broker",
        f"{turns} of {turns}, all 0, one",
        f"{len(executions)} of {turns}, {attempts}, {'one' if same else 'others'}; counted {trouble or 'nothing else'}",
        len(executions) == turns and not any(attempts) and same and not trouble,
    )
