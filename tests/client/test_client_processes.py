"""Real processes, killed, stopped and started in any order; the client of most tests lives in the test."""

import asyncio
import itertools
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import ralmq
from ralmq import errors
from ralmq.client.client import Client
from serving import Process, broker, free_url, until, worker

HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(HERE / "recorder.py", tmp_path)
    return tmp_path


def record(folder: Path) -> Counter[str]:
    """How often each event stands in the record, without the pids."""
    path = folder / "record"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.rpartition(" ")[0] for line in lines)


def begun_by(folder: Path, number: int) -> list[int]:
    lines = (folder / "record").read_text().splitlines()
    return [int(line.split()[2]) for line in lines if line.startswith(f"begin {number} ")]


async def workers_of(client: Client, states: str = "ready") -> list[dict]:
    return [found for found in (await client.status())["workers"] if found["state"] == states]


async def present(client: Client, count: int) -> None:
    """Returns once so many workers are ready."""

    async def enough() -> bool:
        return len(await workers_of(client)) == count

    await until(enough, f"{count} workers")


async def unused(client: Client) -> None:
    """Returns once no worker has anything in flight."""

    async def done() -> bool:
        status = await client.status()
        return not any(found["in_flight"] for found in status["workers"]) and not status["broker"]["open_requests"]

    await until(done, "the end of all requests")


@pytest.mark.parametrize("order", list(itertools.permutations(["broker", "worker", "client"])))
async def test_every_order_of_start(order: tuple[str, ...], folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        asker = None
        for what in order:
            if what == "client":
                command = [sys.executable, str(HERE / "asker.py"), url, "100"]
                asker = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
                stack.callback(asker.kill)
            else:
                stack.enter_context(broker(folder, url) if what == "broker" else worker(folder, url))
            await asyncio.sleep(0.3)
        assert asker is not None and asker.stdout is not None
        await until(lambda: asker.poll() is not None, "the end of the client", within=60)
        assert asker.returncode == 0 and int(asker.stdout.read()) == sum(range(100))


async def test_a_broker_that_is_killed_and_started_again(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(worker(folder, url, "recorder:Recorder"))
        stack.enter_context(worker(folder, url, "recorder:Once", name="once"))
        first = stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        await present(client, 2)
        tasks = [
            asyncio.create_task(client.request(name, {"n": n, "seconds": 2}, deadline=60))
            for n, name in enumerate(["recorder", "once"])
        ]
        await until(lambda: record(folder)["begin 0"] == 1 and record(folder)["begin 1"] == 1)
        first.send(signal.SIGKILL)
        await first.ended()
        stack.enter_context(broker(folder, url))
        assert (await tasks[0]).body["n"] == 0
        with pytest.raises(errors.WorkerLost, match="not safe to repeat"):
            await tasks[1]
        await present(client, 2)
        for n, name in ((2, "recorder"), (3, "once")):
            assert (await client.request(name, {"n": n, "seconds": 0})).body["n"] == n
        await unused(client)
    seen = record(folder)
    assert (seen["begin 0"], seen["end 0"]) == (2, 1)  # the first was given up when its broker died
    assert (seen["begin 1"], seen["end 1"]) == (1, 0)


async def test_a_broker_is_killed_under_load_and_every_request_is_answered(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        for _ in range(2):
            stack.enter_context(worker(folder, url, delay_ms=20, jitter_ms=20))
        serving = stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        await present(client, 2)
        asked = [client.request("echo", {"n": n}, deadline=120, retries=100) for n in range(1000)]
        tasks = [asyncio.create_task(one) for one in asked]
        for answered in (100, 500):
            await until(lambda: sum(task.done() for task in tasks) >= answered)  # noqa: B023
            serving.send(signal.SIGKILL)
            await serving.ended()
            serving = stack.enter_context(broker(folder, url))
        assert [(await task).body["n"] for task in tasks] == list(range(1000))
        await unused(client)


async def test_a_worker_that_is_killed_in_mid_request(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        first = stack.enter_context(worker(folder, url, "recorder:Recorder"))
        await present(client, 1)
        task = asyncio.create_task(client.request("recorder", {"n": 0, "seconds": 3600}, deadline=60))
        await until(lambda: record(folder)["begin 0"] == 1)
        assert begun_by(folder, 0) == [first.pid]
        second = stack.enter_context(worker(folder, url, "recorder:Recorder"))
        await present(client, 2)
        quick = asyncio.create_task(client.request("recorder", {"n": 1, "seconds": 1}, deadline=60))
        await until(lambda: record(folder)["begin 1"] == 1)
        assert begun_by(folder, 1) == [second.pid]  # the one with less work
        first.send(signal.SIGKILL)
        await until(lambda: record(folder)["begin 0"] == 2)
        assert begun_by(folder, 0) == [first.pid, second.pid]
        assert (await quick).body == {"n": 1, "pid": second.pid}
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        await unused(client)
        assert record(folder)["end 0"] == 0 and record(folder)["end 1"] == 1


async def test_requests_of_a_killed_worker_are_answered_once_by_another(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        doomed = stack.enter_context(worker(folder, url, "recorder:Recorder"))
        await present(client, 1)
        asked = [client.request("recorder", {"n": n, "seconds": 0.5}, deadline=60) for n in range(40)]
        tasks = [asyncio.create_task(one) for one in asked]
        await until(lambda: sum(count for event, count in record(folder).items() if "begin" in event) >= 16)
        other = stack.enter_context(worker(folder, url, "recorder:Recorder"))
        doomed.send(signal.SIGKILL)
        replies = [await task for task in tasks]
        assert [reply.body["n"] for reply in replies] == list(range(40))
        ends = record(folder)
        from_other = [reply.body["n"] for reply in replies if reply.body["pid"] == other.pid]
        assert from_other and all(ends[f"end {n}"] >= 1 for n in range(40))
        counts = (await client.status())["broker"]["counts"]
        assert counts["requeued"] >= 1 and counts["lost_peers"] == 1 and "fenced" not in counts
        await unused(client)


async def test_a_killed_worker_whose_requests_must_not_be_repeated(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        doomed = stack.enter_context(worker(folder, url, "recorder:Once", name="once", capacity=2))
        stack.enter_context(worker(folder, url, name="spare"))
        await present(client, 2)
        tasks = [asyncio.create_task(client.request("once", {"n": n, "seconds": 3600}, deadline=60)) for n in range(2)]
        await until(lambda: record(folder)["begin 0"] == 1 and record(folder)["begin 1"] == 1)
        waiting = asyncio.create_task(client.request("once", {"n": 2, "seconds": 0}, deadline=60))
        await asyncio.sleep(0.2)
        doomed.send(signal.SIGKILL)
        for task in tasks:
            with pytest.raises(errors.WorkerLost, match="died or was cut off") as caught:
                await task
            assert caught.value.fault == "worker" and caught.value.retryable
        stack.enter_context(worker(folder, url, "recorder:Once", name="once"))
        assert (await waiting).body["n"] == 2  # it had not been begun
        assert record(folder) == Counter({"begin 0": 1, "begin 1": 1, "begin 2": 1, "end 2": 1})


async def test_sigterm_drains(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        leaving = stack.enter_context(worker(folder, url, "recorder:Once", name="once", capacity=8))
        await present(client, 1)
        asked = [client.request("once", {"n": n, "seconds": 2}, deadline=60) for n in range(12)]
        tasks = [asyncio.create_task(one) for one in asked]
        await until(lambda: sum(record(folder).values()) == 8)
        leaving.send(signal.SIGTERM)

        async def draining() -> bool:
            return len(await workers_of(client, "draining")) == 1

        await until(draining)
        stack.enter_context(worker(folder, url, "recorder:Once", name="once"))
        assert [(await task).body["n"] for task in tasks] == list(range(12))
        assert await leaving.ended() == 0
        assert all(record(folder)[f"{what} {n}"] == 1 for what in ("begin", "end") for n in range(12))
        assert len(begun_by(folder, 0)) == 1 and "lost_peers" not in (await client.status())["broker"]["counts"]
        await present(client, 1)


async def test_a_stopped_worker_is_fenced_and_comes_back(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        stopped = stack.enter_context(worker(folder, url, "recorder:Recorder", capacity=4))
        await present(client, 1)
        asked = [client.request("recorder", {"n": n, "seconds": 1.5}, deadline=60) for n in range(4)]
        tasks = [asyncio.create_task(one) for one in asked]
        await until(lambda: sum(record(folder).values()) == 4)
        stopped.send(signal.SIGSTOP)
        other = stack.enter_context(worker(folder, url, "recorder:Recorder"))
        assert [(await task).body for task in tasks] == [{"n": n, "pid": other.pid} for n in range(4)]
        await present(client, 1)
        stopped.send(signal.SIGCONT)
        await present(client, 2)
        other.send(signal.SIGKILL)
        await present(client, 1)
        assert (await client.request("recorder", {"n": 9, "seconds": 0})).body == {"n": 9, "pid": stopped.pid}
        await unused(client)


async def test_a_client_that_is_killed_leaves_nothing_running(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        stack.enter_context(worker(folder, url, delay_ms=3_600_000))
        await present(client, 1)
        asker = stack.enter_context(subprocess.Popen([sys.executable, str(HERE / "asker.py"), url, "50"]))
        stack.callback(asker.kill)

        async def working() -> bool:
            return (await workers_of(client))[0]["in_flight"] == 50

        await until(working)
        asker.kill()
        await unused(client)


async def test_two_brokers_on_one_address(folder: Path) -> None:
    url = free_url()
    async with AsyncExitStack() as stack:
        stack.enter_context(broker(folder, url))
        await stack.enter_async_context(ralmq.connect(url, wait=30))  # the first one is bound
        second = stack.enter_context(Process(folder, "broker", "--bind", url))
        assert await second.ended() == 2
        assert "is taken" in second.log and "Traceback" not in second.log
