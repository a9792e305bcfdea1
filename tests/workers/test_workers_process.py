"""A worker as a process: how it starts, serves, and ends."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import ralmq
from serving import Process, broker, free_url, until, worker

MODULE = """
import asyncio
import ralmq

class Slow(ralmq.Worker):
    service = "slow"

    def __init__(self, *, text: str = "") -> None:
        self.text = text

    async def stop(self) -> None:
        print("stopped", flush=True)

    async def handle(self, request):
        print("begun", flush=True)
        await asyncio.sleep(3600)

class Broken(ralmq.Worker):
    service = "broken"

    async def start(self) -> None:
        raise ralmq.errors.Refused("no such model here: give -o model=DIR")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_in_order_also_before_it_found_a_broker(number: signal.Signals, folder: Path) -> None:
    url = free_url()
    with worker(folder, url, "mine:Slow") as process:
        await asyncio.sleep(1.0)
        process.send(number)
        code = await process.ended()
        early = (-number, 128 + number)  # it may not have begun to listen: the shell's code where Python was that far
        assert code == 0 or (code in early and not process.log)
        assert "Traceback" not in process.log


async def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        process = stack.enter_context(worker(folder, url, "mine:Slow"))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        task = asyncio.create_task(client.request("slow", wait_service=30, deadline=600))
        await until(lambda: "begun" in process.log)
        process.send(signal.SIGTERM)

        async def draining() -> bool:
            return (await client.status())["workers"][0]["state"] == "draining"

        await until(draining)
        process.send(signal.SIGTERM)
        assert await process.ended() == -signal.SIGTERM
        with pytest.raises(ralmq.errors.WorkerLost):
            await task


async def test_it_ends_when_the_process_that_started_it_is_gone(folder: Path) -> None:
    url = free_url()
    reading, writing = os.pipe()
    with Process(folder, "worker", "mine:Slow", "--broker", url, inherit=reading) as process:
        os.close(reading)
        await asyncio.sleep(1.0)
        assert process.process is not None and process.process.poll() is None
        os.close(writing)
        assert await process.ended() == 0


async def test_it_ends_soon_when_its_broker_is_gone_too(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        serving = stack.enter_context(broker(folder, url))
        process = stack.enter_context(worker(folder, url, "mine:Slow"))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        task = asyncio.create_task(client.request("slow", wait_service=30, deadline=600))
        await until(lambda: "begun" in process.log)
        serving.send(signal.SIGKILL)
        await serving.ended()
        process.send(signal.SIGTERM)
        assert await process.ended() == 0  # nobody waits for what it has in hand
        assert "stopped" in process.log
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [
        ("mine:Broken", {}, "no such model here"),
        ("mine:Nothing", {}, "no subclass of ralmq.Worker"),
        ("nobody", {}, "no worker is called nobody"),
        ("mine:Slow", {"size": 3}, "has no option size"),
        ("echo", {"delay_ms": "long"}, "-o delay_ms=long"),
    ],
)
async def test_bad_input_is_one_line_and_exit_code_2(
    kind: str, options: dict[str, object], part: str, folder: Path
) -> None:
    with worker(folder, free_url(), kind, **options) as process:
        assert await process.ended() == 2
        assert part in process.log and process.log.count("\n") == 1
