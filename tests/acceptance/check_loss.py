"""No silent loss: more requests than a worker can take, all at once. Each ends in an answer or in BUSY."""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ralmq
from checks import Line, check
from ralmq.broker.limits import Limits
from ralmq.client.client import Client
from ralmq.errors import Busy
from serving import broker, free_url, until, worker

COUNT = 20_000
BODY = {"filler": bytes(6 * 1024)}
PATIENCE = 300.0  # seconds: the deadline of each request
GROWTH = 64 << 20  # bytes that the broker may grow by; the requests have 117 MiB together


class Flood:
    """20,000 requests sent as fast as one client can; then those refused, each when its BUSY said, until answered."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answered = 0  # at the first try
        self.refused: list[float] = []  # loop times at which they may come again
        self.later: Counter[int] = Counter()  # resends needed -> requests
        self.without_time = 0  # BUSY without a retry-after
        self.errors: Counter[str] = Counter()
        self.sending = 0.0  # seconds from the first to the last send

    async def run(self) -> None:
        start = time.monotonic()
        tasks = []
        for number in range(COUNT):
            tasks.append(asyncio.create_task(self._first()))
            if not number % 50:
                await asyncio.sleep(0)
        wire = self.client._link._wire
        assert wire is not None
        while wire.blocked:  # the socket has not taken all of it yet
            await asyncio.sleep(0.001)
        self.sending = time.monotonic() - start
        await asyncio.gather(*tasks)
        await asyncio.gather(*[self._again(when) for when in self.refused])

    async def _first(self) -> None:
        when = await self._ask()
        if when:
            self.refused.append(when)
        elif when == 0.0:
            self.answered += 1

    async def _again(self, when: float | None) -> None:
        resends = 0
        while when:
            await asyncio.sleep(when - asyncio.get_running_loop().time())
            resends += 1
            when = await self._ask()
        if when == 0.0:
            self.later[resends] += 1

    async def _ask(self) -> float | None:
        """0 where it is answered, when to ask again after BUSY, None after another error."""
        try:
            await self.client.request("echo", BODY, deadline=PATIENCE)
        except Busy as error:
            self.without_time += error.retry_after <= 0
            return asyncio.get_running_loop().time() + error.retry_after
        except ralmq.errors.RalmqError as error:
            self.errors[error.code] += 1
            return None
        return 0.0


async def rate_alone(client: Client, count: int, at_once: int = 200) -> float:
    """Answers a second of the worker with nothing else going on."""
    slots = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with slots:
            await client.request("echo", BODY, deadline=PATIENCE)

    await asyncio.gather(*[one() for _ in range(at_once)])
    start = time.monotonic()
    await asyncio.gather(*[one() for _ in range(count)])
    return count / (time.monotonic() - start)


def memory(pid: int, name: str) -> int:
    """VmRSS or VmHWM of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


async def flooded(folder: Path, kind: str, **options: Any) -> AsyncIterator[Line]:
    url = free_url()
    with broker(folder, url) as server, worker(folder, url, kind, **options):
        async with ralmq.connect(url, wait=20) as client:
            await client.request("echo", wait_service=20)
            rate = await rate_alone(client, 2000)
            before = memory(server.pid, "VmRSS")
            flood = Flood(client)
            start = time.monotonic()
            await flood.run()
            whole = time.monotonic() - start
            growth = memory(server.pid, "VmHWM") - before

            async def settled() -> bool:
                status = await client.status()
                return not status["broker"]["open_requests"] and not status["workers"][0]["in_flight"]

            await until(settled)
    least = Limits().queue + 0.8 * rate * flood.sending
    again = sum(flood.later.values())
    yield Line(
        f"answered + BUSY, {kind}",
        f"= {COUNT}, no other end",
        f"{flood.answered} + {len(flood.refused)}, others {dict(flood.errors)}",
        flood.answered + len(flood.refused) == COUNT and not flood.errors,
    )
    yield Line(
        f"answered at the first try, {kind}",
        f">= {least:.0f} (queue + 0.8 x {rate:.0f}/s x {flood.sending:.2f} s)",
        str(flood.answered),
        flood.answered >= least,
    )
    yield Line(
        f"BUSY whose resends are answered, {kind}",
        f"all {len(flood.refused)}, each with a retry-after",
        f"{again}; resends needed {dict(sorted(flood.later.items()))}; "
        f"all done after {whole:.1f} s, {COUNT / whole / rate:.2f} of the rate alone",
        again == len(flood.refused) and not flood.without_time,
    )
    yield Line(
        f"growth of the broker's memory, {kind}",
        f"<= {GROWTH >> 20} MiB",
        f"{growth / (1 << 20):.0f} MiB",
        growth <= GROWTH,
    )


@check
async def no_silent_loss(folder: Path) -> AsyncIterator[Line]:
    shutil.copy(Path(__file__).with_name("steady.py"), folder)
    async for line in flooded(folder, "steady:Steady"):
        yield line


@check
async def no_silent_loss_one_in_hand(folder: Path) -> AsyncIterator[Line]:
    async for line in flooded(folder, "echo", delay_ms=1, capacity=1):
        yield line
