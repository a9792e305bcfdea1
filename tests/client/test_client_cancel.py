"""Whoever gives up, in whatever way: the handler is cancelled and the worker's credit comes back."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import ralmq
from fake_broker import FakeBroker
from inprocess import cluster
from ralmq import errors
from ralmq.schema.message import Cancel, Error
from ralmq.schema.message import Request as Asked
from ralmq.workers.base import Answer, Request
from ralmq.workers.host import Host
from serving import until
from workers_for_tests import Count, Gate


async def test_a_cancelled_task_cancels_the_handler() -> None:
    gate = Gate()
    async with cluster(gate) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("gate", {"n": n})) for n in range(5)]
        await until(lambda: gate.begun == 5)
        for task in tasks[:3]:
            task.cancel()
        await until(lambda: gate.cancelled == 3)
        await until(lambda: list(here.in_flight().values()) == [2])
        gate.open.set()
        assert [(await task).body["n"] for task in tasks[3:]] == [3, 4]
        await here.idle()
        assert here.counts["cancelled"] == 3 and gate.ended == 2
        assert all(task.cancelled() for task in tasks[:3])


async def test_a_queued_request_that_is_given_up_never_reaches_the_worker() -> None:
    gate = Gate(capacity=1)
    async with cluster(gate) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("gate", {"n": n})) for n in range(3)]
        await until(lambda: here.queued("gate") == 2)
        tasks[1].cancel()
        await until(lambda: here.counts["cancelled"] == 1)
        gate.open.set()
        assert (await tasks[0]).body["n"] == 0 and (await tasks[2]).body["n"] == 2
        assert gate.seen == [0, 2]
        await here.idle()


@pytest.mark.parametrize("way", ["break", "aclose", "with", "drop", "cancel", "raise"])
async def test_a_stream_that_is_left_ends_at_the_worker(way: str) -> None:
    count = Count()
    async with cluster(count) as here:
        client = await here.client()

        async def leave() -> None:
            stream = client.stream("count", {"to": 10_000})
            if way == "break":
                async for part in stream:
                    if part.body["n"] == 5:
                        break
            elif way == "aclose":
                await anext(stream)
                await stream.aclose()
            elif way == "with":
                async with stream:
                    await anext(stream)
            elif way == "drop":
                await anext(stream)
            elif way == "cancel":
                async for _ in stream:
                    await asyncio.Event().wait()
            else:
                async for part in stream:
                    raise KeyError(part.body["n"])

        task = asyncio.create_task(leave())
        if way == "cancel":
            await until(lambda: count.produced[""] > 0)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (way == "cancel")
        if not task.cancelled():
            task.exception()
        del task
        await until(lambda: count.closed == 1)
        await here.idle()
        assert count.produced[""] < 200


async def test_a_stream_that_was_left_or_has_ended_does_not_hang() -> None:
    async with cluster(Count()) as here:
        client = await here.client()
        left = client.stream("count", {"to": 100})
        await anext(left)
        await left.aclose()
        for _ in range(3):  # parts that had arrived may still be read, then comes the error
            with pytest.raises((errors.RequestCancelled, StopAsyncIteration)):
                for _ in range(100):
                    await anext(left)
        ended = client.stream("count", {"to": 1})
        assert [part.body["n"] async for part in ended] == [0]
        assert [part async for part in ended] == []
        assert ended.final is not None and ended.final.body == {"last": 1}
        failed = client.stream("count", {})  # KeyError in the worker
        with pytest.raises(errors.WorkerFailed):
            await anext(failed)
        with pytest.raises((errors.RequestCancelled, StopAsyncIteration)):
            await anext(failed)


async def test_closing_the_client_ends_what_it_asked() -> None:
    gate, count = Gate(), Count()
    async with cluster(gate, count) as here:
        async with ralmq.connect(here.url) as client:
            task = asyncio.create_task(client.request("gate"))
            stream = client.stream("count", {"to": 10_000})
            await anext(stream)
            await until(lambda: gate.begun == 1)
        with pytest.raises(errors.ConnectionClosed):
            await task
        with pytest.raises(errors.ConnectionClosed):
            async for _ in stream:
                pass
        await until(lambda: gate.cancelled == 1 and count.closed == 1)
        await here.idle()
        with pytest.raises(errors.ConnectionClosed, match="async with"):
            await client.request("gate")
        async with client:  # and it can be opened again
            gate.open.set()
            assert (await client.request("gate", {"n": 7})).body == {"n": 7}


class Stubborn(ralmq.Worker):
    """Answers even when it is cancelled."""

    service = "stubborn"
    capacity = 1

    def __init__(self) -> None:
        self.cancelled = 0

    async def handle(self, request: Request) -> Answer:
        try:
            await asyncio.sleep(3600 if request.body.get("wait") else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
        return {"cancelled": self.cancelled}


async def test_a_handler_that_answers_although_cancelled_gives_its_credit_back() -> None:
    stubborn = Stubborn()
    async with cluster(stubborn) as here:
        client = await here.client()
        for number in range(3):
            task = asyncio.create_task(client.request("stubborn", {"wait": True}))
            await until(lambda: here.in_flight() and max(here.in_flight().values()) == 1)
            task.cancel()
            await asyncio.wait([task])
            assert (await client.request("stubborn")).body == {"cancelled": number + 1}
        await here.idle()


async def test_cancel_before_the_first_step_of_the_handler() -> None:
    gate = Gate()
    with FakeBroker() as fake:
        host = Host(gate, fake.url)
        opening = asyncio.create_task(host.open())
        await fake.welcome()
        await opening
        fake.send(Asked("gate"), id=bytes(15) + b"a", deadline=5000)
        fake.send(Cancel(), id=bytes(15) + b"a")
        fake.hold_up()
        prefix, message = await fake.receive(Error)
        assert prefix.id == bytes(15) + b"a" and message.code == "cancelled"
        assert gate.begun == 0
        await host.close()


class Tidy(ralmq.Worker):
    """A stream whose clean-up takes some turns of the loop."""

    service = "tidy"

    def __init__(self) -> None:
        self.tidied = 0

    async def handle(self, request: Request) -> AsyncIterator[Answer]:
        try:
            while True:
                yield {}
        finally:
            await asyncio.sleep(0.05)
            self.tidied += 1


async def test_clean_up_is_waited_for_when_a_worker_is_closed() -> None:
    tidy = Tidy()
    async with cluster() as here:
        host = await here.worker(tidy)
        client = await here.client()
        stream = client.stream("tidy")
        await anext(stream)
        await host.close()
        assert tidy.tidied == 1
        with pytest.raises(errors.WorkerLost):
            async for _ in stream:
                pass
