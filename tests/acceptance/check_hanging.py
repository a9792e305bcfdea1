"""Nothing hangs: how soon each kind of error comes, and that everyone is back after the broker was killed."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ralmq
from checks import Line, check
from ralmq import errors
from ralmq.broker.limits import Limits
from serving import broker, free_url, until, worker

TURNS = 10


async def seconds_to(error: type[Exception], call: Awaitable[Any]) -> float:
    """How long a call takes to fail in this way.

    Raises:
        AssertionError: it did not.
    """
    start = time.monotonic()
    try:
        await call
    except error:
        return time.monotonic() - start
    raise AssertionError(f"no {error.__name__}")


def slowest(what: str, bound: float, least: float, found: list[float]) -> Line:
    shown = f"{max(found) * 1000:.0f} ms at most, {min(found) * 1000:.0f} ms at least, of {len(found)}"
    limits = f"<= {bound * 1000:.0f} ms" + (f", >= {least * 1000:.0f} ms" if least else "")
    return Line(what, limits, shown, max(found) <= bound and min(found) >= least)


@check
async def no_broker(folder: Path) -> AsyncIterator[Line]:
    for wait in (0.2, 1.0):
        client = ralmq.connect(free_url(), wait=wait)
        found = [await seconds_to(errors.NoBroker, client.__aenter__())]
        yield slowest(f"no broker, wait={wait:g}", wait + 0.1, wait, found)


@check
async def unknown_service_and_deadline(folder: Path) -> AsyncIterator[Line]:
    url = free_url()
    with broker(folder, url), worker(folder, url, delay_ms=1000):
        async with ralmq.connect(url, wait=20) as client:
            await client.request("echo", wait_service=20)
            await asyncio.sleep(Limits().grace)
            found = [await seconds_to(errors.NoService, client.request("nobody")) for _ in range(TURNS)]
            yield slowest("unknown service, 3 intervals after the broker's start", 0.05, 0.0, found)
            found = [
                await seconds_to(errors.DeadlineExceeded, client.request("echo", deadline=0.2)) for _ in range(TURNS)
            ]
            yield slowest("deadline of 200 ms over a worker that sleeps 1 s", 0.26, 0.2, found)


@check
async def broker_killed_and_restarted(folder: Path) -> AsyncIterator[Line]:
    url = free_url()
    with ExitStack() as stack:
        serving = stack.enter_context(broker(folder, url))
        for number in range(3):
            stack.enter_context(worker(folder, url, name=f"echo-{number}", delay_ms=500))
        async with ralmq.connect(url, wait=20) as client, ralmq.connect(url, wait=20) as other:

            async def everyone() -> bool:
                status = await client.status()
                return len(status["workers"]) == 3 and status["broker"]["clients"] == 2

            await until(everyone)
            asked = [
                asyncio.create_task(asker.request(f"echo-{n % 3}", {"n": n}, deadline=60))
                for n in range(60)
                for asker in (client, other)
            ]
            await asyncio.sleep(0.2)
            serving.send(signal.SIGKILL)
            await serving.ended()
            stack.enter_context(broker(folder, url))
            start = time.monotonic()
            answered = [(await task).body["n"] for task in asked]
            await until(everyone)
            back = time.monotonic() - start
    yield Line(
        "broker killed with 120 requests in hand, and restarted",
        "all answered; 3 workers and 2 clients back",
        f"{len(answered)} answered, everyone back {back:.1f} s after the start of the process",
        answered == [n for n in range(60) for _ in range(2)],
    )
