"""Two answers at once never cross: 8 clients, 3 worker processes that answer in bursts and in another order."""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import ralmq
from checks import Line, check
from ralmq.client.client import Client
from serving import broker, free_url, until, worker

CLIENTS = 8
EACH = 1250
AT_ONCE = 100


@check
async def crossing(folder: Path) -> AsyncIterator[Line]:
    url = free_url()
    shutil.copy(Path(__file__).parents[1] / "bursts.py", folder)
    got: Counter[tuple[int, int]] = Counter()
    wrong = 0

    async def ask(client: Client, who: int, number: int, slots: asyncio.Semaphore) -> None:
        nonlocal wrong
        async with slots:
            reply = await client.request("burst", {"who": who, "number": number})
        got[who, number] += 1
        wrong += reply.body != {"who": who, "number": number}

    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for seed in range(3):
            stack.enter_context(worker(folder, url, "bursts:Burst", seed=seed))
        clients = [await stack.enter_async_context(ralmq.connect(url, wait=30)) for _ in range(CLIENTS)]

        async def all_there() -> bool:
            return len((await clients[0].status())["workers"]) == 3

        await until(all_there)
        slots = [asyncio.Semaphore(AT_ONCE) for _ in clients]
        asked = [ask(client, who, n, slots[who]) for n in range(EACH) for who, client in enumerate(clients)]
        failed = [error for error in await asyncio.gather(*asked, return_exceptions=True) if error is not None]
        accepted = (await clients[0].status())["broker"]["counts"]["accepted"]
    total = CLIENTS * EACH
    yield Line(
        "8 clients, 3 workers: answered once, to the right client",
        f"{total} of {total}",
        f"{len(got)}, {wrong} wrong, {len(failed)} failed, accepted {accepted}",
        len(got) == total and set(got.values()) == {1} and not wrong and not failed and accepted == total,
    )
