"""Streams: order, credit, readers that are slow, and what is left of them at the end."""

import asyncio

import pytest
from inprocess import cluster
from ralmq import errors
from ralmq.broker.limits import Limits
from serving import until
from workers_for_tests import Count, Gate


@pytest.mark.parametrize(("parts", "window"), [(300, 64), (300, 1), (64, 64), (0, 64), (5000, 3), (3000, 0)])
async def test_parts_come_in_order_each_once(parts: int, window: int) -> None:
    count = Count()
    async with cluster(count) as here:
        client = await here.client()
        stream = client.stream("count", {"to": parts}, window=window)
        assert [part.body["n"] async for part in stream] == list(range(parts))
        assert stream.final is not None and stream.final.body == {"last": parts}
        await here.idle()
        assert count.closed == 1


async def test_a_slow_reader_pauses_its_own_stream_alone() -> None:
    count = Count()
    async with cluster(count) as here:
        client = await here.client()
        slow = client.stream("count", {"to": 1000, "name": "slow"})
        for taken in range(1, 101):
            await anext(slow)
            if taken % 25 == 0:
                quick = client.stream("count", {"to": 300, "name": f"quick-{taken}"})
                assert len([part async for part in quick]) == 300  # the other has stood still all the time
                assert count.produced["slow"] <= taken + 64 + 1  # one is made, and waits for credit
        await until(lambda: count.produced["slow"] >= 64 + 64)
        assert len([part async for part in slow]) == 900
        await here.idle()


async def test_a_stream_that_never_waits_does_not_hold_up_its_worker() -> None:
    count = Count()
    async with cluster(count) as here:
        client = await here.client()
        flood = client.stream("count", {"to": 100_000, "name": "flood"}, window=0)
        await anext(flood)
        assert [part.body["n"] async for part in client.stream("count", {"to": 5})] == list(range(5))
        assert count.produced["flood"] < 100_000
        await flood.aclose()
        await here.idle()


async def test_several_streams_share_a_client() -> None:
    async with cluster(Count(), Count()) as here:
        client = await here.client()

        async def read(to: int) -> list[int]:
            return [part.body["n"] async for part in client.stream("count", {"to": to, "slow": True})]

        found = await asyncio.gather(*[read(50 + 10 * place) for place in range(20)])
        assert found == [list(range(50 + 10 * place)) for place in range(20)]
        await here.idle()


async def test_a_request_to_a_streaming_service_gets_the_end() -> None:
    async with cluster(Count()) as here:
        client = await here.client()
        assert (await client.request("count", {"to": 1000})).body == {"last": 1000}


async def test_a_stream_has_one_reader_at_a_time() -> None:
    gate = Gate()
    async with cluster(gate) as here:
        client = await here.client()
        stream = client.stream("gate", {"n": 3})
        first = asyncio.create_task(anext(stream, None))
        await until(lambda: gate.begun == 1)
        with pytest.raises(RuntimeError, match="one reader"):
            await anext(stream)
        with pytest.raises((errors.RequestCancelled, StopAsyncIteration)):
            await first  # the stream is over: what a second reader missed cannot be given back


async def test_a_stream_is_asked_again_after_busy() -> None:
    gate, limits = Gate(capacity=1), Limits(queue=1, beat=0.1)
    async with cluster(gate, limits=limits) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("gate", {"n": n})) for n in range(2)]
        await until(lambda: here.counts["accepted"] == 2)
        with pytest.raises(errors.Busy):
            await anext(client.stream("gate", {"n": 2}))
        stream = client.stream("gate", {"n": 2}, retries=1000)
        reading = asyncio.create_task(anext(stream, None))
        await until(lambda: here.counts["busy"] >= 3)
        gate.open.set()
        assert await reading is None
        assert stream.final is not None and stream.final.body == {"n": 2}
        assert [(await task).body["n"] for task in tasks] == [0, 1]
        await here.idle()
