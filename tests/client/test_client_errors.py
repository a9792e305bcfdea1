"""Every way to fail has its own error, says whose fault it is, and comes by itself."""

import asyncio
from typing import Any

import numpy as np
import pytest
import ralmq
from inprocess import PACE, cluster
from ralmq import errors
from ralmq.broker.limits import Limits
from ralmq.broker.server import Server
from ralmq.workers.base import Answer, Request
from ralmq.workers.echo import Echo
from serving import free_url, until
from workers_for_tests import Gate


class Faulty(ralmq.Worker):
    """Fails in the way that the request names."""

    service = "faulty"

    async def handle(self, request: Request) -> Answer:
        answers: dict[str, Any] = {
            "no map": [1, 2],
            "object": {"x": object()},
            "key": {1: 2},
            "large": {"x": bytes(2 << 20)},
            "dtype": ({}, [np.array(["text"])]),
            "no list": ({}, np.zeros(3)),
            "recursive": (loop := {}),
        }
        loop["self"] = loop
        way = request.body["way"]
        if way in answers:
            return answers[way]
        raised: dict[str, BaseException] = {
            "error": ValueError("a bad value"),
            "refused": errors.Refused("not this one"),
            "busy": errors.Busy("later", retry_after=1.5),
            "never": errors.Busy("never", retry_after=float("inf")),
            "long": ValueError("x" * 100_000),
            "cancelled": asyncio.CancelledError(),
            "stop": StopAsyncIteration(),
            "surrogate": ValueError("\udcff"),
            "base": errors.RalmqError("just so"),
        }
        raise raised[way]


class Parts(ralmq.Worker):
    """Streams a good part and then the bad ones of Faulty."""

    service = "parts"

    async def handle(self, request: Request) -> Any:
        yield {"good": True}
        yield await Faulty().handle(request)


@pytest.mark.parametrize(
    ("way", "kind", "text"),
    [
        ("error", errors.WorkerFailed, "ValueError: a bad value"),
        ("long", errors.WorkerFailed, "ValueError: xxx"),
        ("surrogate", errors.WorkerFailed, "ValueError"),
        ("stop", errors.WorkerFailed, "StopAsyncIteration"),
        ("no map", errors.WorkerFailed, "answers with a map"),
        ("object", errors.WorkerFailed, "cannot travel"),
        ("key", errors.WorkerFailed, "cannot travel"),
        ("large", errors.WorkerFailed, "cannot travel"),
        ("dtype", errors.WorkerFailed, "cannot travel"),
        ("no list", errors.WorkerFailed, "cannot travel"),
        ("recursive", errors.WorkerFailed, "cannot travel"),
        ("refused", errors.Refused, "not this one"),
        ("busy", errors.Busy, "later"),
        ("never", errors.WorkerFailed, "cannot travel"),
        ("cancelled", errors.RequestCancelled, "cancelled"),
        ("base", errors.RalmqError, "just so"),
    ],
)
async def test_what_a_worker_does_wrong_reaches_the_asker(way: str, kind: type[Exception], text: str) -> None:
    async with cluster(Faulty(), Parts()) as here:
        client = await here.client()
        with pytest.raises(errors.RalmqError, match=text) as caught:
            await client.request("faulty", {"way": way})
        assert type(caught.value) is kind
        assert caught.value.request_id is not None
        if way == "busy":
            assert caught.value.retry_after == 1.5
        stream = client.stream("parts", {"way": way})
        assert (await anext(stream)).body == {"good": True}
        with pytest.raises(errors.RalmqError):
            await anext(stream)
        await here.idle()  # whatever it was, the credit is back


async def test_an_unknown_service_is_refused_once_the_broker_has_settled() -> None:
    async with cluster() as here:
        client = await here.client()
        with pytest.raises(errors.NoService, match="no worker offers nobody: start one") as caught:
            await client.request("nobody")  # while the broker is young it waits for a worker to come
        assert caught.value.fault == "caller" and caught.value.retryable
        asked = here.counts["accepted"]
        for _ in range(3):
            with pytest.raises(errors.NoService):
                await client.request("nobody")
        assert here.counts["accepted"] == asked  # refused at once, not after a wait


async def test_a_service_may_be_waited_for() -> None:
    async with cluster() as here:
        client = await here.client()
        with pytest.raises(errors.NoService):
            await client.request("echo")
        task = asyncio.create_task(client.request("echo", {"n": 1}, wait_service=30))
        stream = client.stream("echo", {"n": 2}, wait_service=30)
        await until(lambda: here.queued("echo") == 2)
        await here.worker(Echo())
        assert (await task).body == {"n": 1}
        assert [part async for part in stream] == [] and stream.final is not None and stream.final.body == {"n": 2}
        with pytest.raises(errors.NoService):
            await client.request("other", wait_service=0.05)
        await here.idle()


async def test_the_deadline_of_a_running_and_of_a_queued_request() -> None:
    gate = Gate(capacity=1)
    async with cluster(gate) as here:
        client = await here.client()
        found = await asyncio.gather(
            client.request("gate", {"n": 0}, deadline=0.2),
            client.request("gate", {"n": 1}, deadline=0.1),
            return_exceptions=True,
        )
        assert [type(error) for error in found] == [errors.DeadlineExceeded] * 2
        assert "did not end in time" in str(found[0]) and "was free in time" in str(found[1])
        await until(lambda: gate.cancelled == 1)
        assert gate.seen == [0]
        await here.idle()
        with pytest.raises(errors.DeadlineExceeded):
            await anext(client.stream("gate", deadline=0.1))


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), 1e10])
async def test_deadlines_that_are_none(deadline: float) -> None:
    async with cluster(Echo()) as here:
        client = await here.client()
        with pytest.raises(errors.Refused, match="out of range"):
            client.stream("echo", deadline=deadline)
        with pytest.raises(errors.Refused, match="out of range"):
            client.stream("echo", wait_service=deadline or -1)
        with pytest.raises(errors.RalmqError):
            await client.request("echo", deadline=deadline)
        assert here.counts["accepted"] == 0


@pytest.mark.parametrize(
    ("body", "tensors"),
    [({"x": object()}, []), ({1: 2}, []), ({"x": bytes(2 << 20)}, []), ({}, [np.array(["a"])]), ({}, [[1.0]])],
)
async def test_what_cannot_travel_is_refused_on_this_side(body: dict[Any, Any], tensors: list[Any]) -> None:
    async with cluster(Echo()) as here:
        client = await here.client()
        with pytest.raises(errors.Malformed) as caught:
            await client.request("echo", body, tensors=tensors)
        assert caught.value.fault == "caller"
        assert here.counts["accepted"] == 0 and here.counts["malformed"] == 0


async def test_busy_says_when_to_ask_again_and_retries_do_so() -> None:
    gate, limits = Gate(capacity=2), Limits(queue=3, beat=0.1)
    async with cluster(gate, limits=limits) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("gate", {"n": n})) for n in range(5)]
        await until(lambda: here.counts["accepted"] == 5)
        with pytest.raises(errors.Busy, match="3 requests wait for gate: ask again in") as caught:
            await client.request("gate")
        assert caught.value.retry_after > 0 and caught.value.fault == "broker"
        with pytest.raises(errors.Busy):
            await client.request("gate", retries=2)
        assert here.counts["busy"] == 4
        patient = [asyncio.create_task(client.request("gate", {"n": n}, retries=1000)) for n in range(5, 30)]
        await until(lambda: here.counts["busy"] >= 40)
        gate.open.set()
        assert [(await task).body["n"] for task in (*tasks, *patient)] == list(range(30))
        await here.idle()


async def test_busy_past_the_deadline_is_told_at_once() -> None:
    gate, limits = Gate(capacity=1), Limits(queue=1, beat=0.1)
    async with cluster(gate, limits=limits) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("gate", deadline=5)) for n in range(2)]
        await until(lambda: here.counts["accepted"] == 2)
        with pytest.raises(errors.Busy):
            await client.request("gate", retries=10, deadline=0.01)
        assert here.counts["busy"] == 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await here.idle()


async def test_no_broker_and_no_address() -> None:
    with pytest.raises(errors.NoBroker, match="start one with `ralmq up`"):
        async with ralmq.connect(free_url(), wait=0.2):
            pass
    for url in ("127.0.0.1:5555", "tcp://", "", "http://x"):
        with pytest.raises(errors.Refused, match="no broker address"):
            async with ralmq.connect(url, wait=0.2):
                pass


async def test_opening_may_be_cancelled() -> None:
    task = asyncio.create_task(ralmq.connect(free_url(), wait=float("inf")).__aenter__())
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_two_brokers_cannot_bind_one_address() -> None:
    async with Server("tcp://127.0.0.1:*", limits=PACE) as server:
        with pytest.raises(errors.Refused, match="is taken: stop the broker that runs there"):
            await Server(server.endpoint).__aenter__()
        with pytest.raises(errors.Refused, match="cannot bind"):
            await Server("tcp://nowhere.invalid:1").__aenter__()
