"""The broker, or the connection to it, goes and comes back: everyone is back by itself, nothing hangs or doubles."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import ralmq
from inprocess import PACE, Cluster, cluster
from ralmq import errors
from ralmq.broker.limits import Limits
from ralmq.broker.server import Server
from ralmq.workers.echo import Echo
from ralmq.workers.host import Host
from relay import Relay
from serving import free_url, until
from workers_for_tests import Count, Gate


async def restart(here: Cluster) -> None:
    await here.stop()
    await here.start()


async def test_a_broker_that_is_restarted_gets_everyone_back() -> None:
    safe, unsafe, echo = Gate(idempotent=True, service="safe"), Gate(service="unsafe"), Echo()
    async with cluster(safe, unsafe, echo) as here:
        client = await here.client()
        for turn in range(1, 4):
            safe.open.clear()
            tasks = [asyncio.create_task(client.request(name, {"n": turn})) for name in ("safe", "unsafe")]
            await until(lambda: safe.begun == 2 * turn - 1 and unsafe.begun == turn)  # noqa: B023
            await restart(here)
            await until(lambda: safe.cancelled == turn and unsafe.cancelled == turn)  # noqa: B023
            await until(lambda: safe.begun == 2 * turn)  # noqa: B023
            safe.open.set()
            assert (await tasks[0]).body == {"n": turn}
            with pytest.raises(errors.WorkerLost, match="not safe to repeat"):
                await tasks[1]
            assert (await client.request("echo", {"turn": turn})).body == {"turn": turn}
            await here.idle()
            assert len(here.server.core.roster.peers) == 4
        assert (safe.ended, unsafe.ended, unsafe.begun) == (3, 0, 3)


async def test_ipc_as_well(tmp_path: Path) -> None:
    url = f"ipc://{tmp_path}/broker"
    host = Host(Echo(), url)
    opening = asyncio.create_task(host.open(wait=30))
    async with AsyncExitStack() as stack:
        server = Server(url, limits=PACE)
        await server.__aenter__()
        client = await stack.enter_async_context(ralmq.connect(url, wait=30))
        await opening
        for number in range(3):
            assert (await client.request("echo", {"n": number}, wait_service=30)).body == {"n": number}
            await server.__aexit__()
            server = Server(url, limits=PACE)
            await server.__aenter__()
        assert (await client.request("echo", {"n": 9}, wait_service=30)).body == {"n": 9}
        await host.drain()
    await server.__aexit__()


async def test_a_stream_goes_on_over_a_restart_without_gap_or_repeat() -> None:
    count = Count()
    async with cluster(count) as here:
        client = await here.client()
        got = []
        async for part in client.stream("count", {"to": 1000}):
            got.append(part.body["n"])
            if part.body["n"] in (10, 300, 700):
                await restart(here)
        assert got == list(range(1000))
        assert count.closed == 4
        await here.idle()


async def test_requests_made_while_the_broker_is_away_wait_for_it() -> None:
    async with cluster(Echo()) as here:
        client = await here.client()
        await here.stop()
        tasks = [asyncio.create_task(client.request("echo", {"n": n})) for n in range(1000)]
        dropped = [asyncio.create_task(client.request("echo")) for _ in range(100)]
        await asyncio.sleep(0.05)
        with pytest.raises(errors.DeadlineExceeded, match="is away"):
            await client.request("echo", deadline=0.1)
        for task in dropped:
            task.cancel()
        await asyncio.wait(dropped)
        await here.start()
        assert [(await task).body["n"] for task in tasks] == list(range(1000))
        await here.idle()
        assert here.counts["accepted"] == 1000


async def test_any_order_of_start() -> None:
    url = free_url()
    host = Host(Echo(), url)
    worker = asyncio.create_task(host.open(wait=30))
    client = ralmq.connect(url, wait=30)
    opening = asyncio.create_task(client.__aenter__())
    await asyncio.sleep(1.2)  # some HELLOs find nobody
    async with Server(url, limits=PACE) as server:
        await asyncio.gather(worker, opening)
        assert (await client.request("echo", {"n": 1}, wait_service=30)).body == {"n": 1}
        assert server.core.requests.counts["malformed"] == 0
        await client.__aexit__(None, None, None)
        await host.drain()


async def test_a_client_that_was_cut_off_asks_again() -> None:
    safe, unsafe = Gate(idempotent=True, service="safe"), Gate(service="unsafe")
    async with cluster(safe, unsafe, Count()) as here, Relay(here.url) as relay:
        client = await here.client(relay.url)
        stream = client.stream("count", {"to": 500})
        got = [(await anext(stream)).body["n"] for _ in range(100)]
        tasks = [asyncio.create_task(client.request(name, {"n": 1})) for name in ("safe", "unsafe")]
        await until(lambda: safe.begun == 1 and unsafe.begun == 1)
        relay.cut()
        await until(lambda: safe.begun == 2)
        safe.open.set()
        assert (await tasks[0]).body == {"n": 1}
        with pytest.raises(errors.WorkerLost, match="not safe to repeat"):
            await tasks[1]
        got += [part.body["n"] async for part in stream]
        assert got == list(range(500))
        await here.idle()
        assert safe.cancelled == 1 and unsafe.cancelled == 1 and relay.connections == 2


async def test_a_worker_that_was_cut_off_is_replaced_and_comes_back() -> None:
    first, second = Gate(idempotent=True), Gate(idempotent=True)
    async with cluster() as here, Relay(here.url) as relay:
        await here.worker(first, relay.url)
        client = await here.client()
        tasks = [asyncio.create_task(client.request("gate", {"n": n})) for n in range(4)]
        await until(lambda: first.begun == 4)
        await here.worker(second)
        relay.cut()
        await until(lambda: first.cancelled == 4 and second.begun + first.begun == 6)  # one at a time on each now
        await until(lambda: len(here.in_flight()) == 2)
        first.open.set()
        second.open.set()
        assert [(await task).body["n"] for task in tasks] == [0, 1, 2, 3]
        await here.idle()
        assert first.ended + second.ended == 4 and here.counts["requeued"] == 4


async def test_a_broker_sees_at_once_that_a_connection_has_ended() -> None:
    gate = Gate()
    async with cluster(limits=Limits(beat=60)) as here, Relay(here.url) as relay:  # no BEAT would find it in time
        await here.worker(gate, relay.url)
        client = await here.client()
        task = asyncio.create_task(client.request("gate"))
        await until(lambda: gate.begun == 1)
        relay.cut()
        with pytest.raises(errors.WorkerLost, match="died or was cut off"):
            await task


async def test_a_network_that_swallows_everything_is_noticed() -> None:
    safe = Gate(idempotent=True)
    async with cluster(safe) as here, Relay(here.url) as relay:
        client = await here.client(relay.url)
        task = asyncio.create_task(client.request("gate", {"n": 1}))
        await until(lambda: safe.begun == 1)
        relay.stop()
        await until(lambda: safe.cancelled == 1)  # the broker's heartbeats find it, and nobody waits any more
        relay.go_on()
        await until(lambda: safe.begun == 2)
        safe.open.set()
        assert (await task).body == {"n": 1}
        await here.idle()


async def test_many_cuts_under_load() -> None:
    async with cluster(Echo(jitter_ms=5), Count()) as here, Relay(here.url) as near, Relay(here.url) as far:
        await here.worker(Echo(jitter_ms=5), far.url)
        clients = [await here.client(near.url), await here.client()]

        async def ask(number: int) -> int:
            await asyncio.sleep(number % 100 / 50)
            return (await clients[number % 2].request("echo", {"n": number})).body["n"]

        async def read() -> list[int]:
            return [part.body["n"] async for part in clients[0].stream("count", {"to": 1000, "slow": True})]

        reading = asyncio.create_task(read())
        asking = [asyncio.create_task(ask(number)) for number in range(2000)]
        for _ in range(8):
            await asyncio.sleep(0.3)
            near.cut()
            far.cut()
        found = await asyncio.gather(*asking, return_exceptions=True)
        lost = [error for error in found if not isinstance(error, int)]
        assert all(isinstance(error, errors.WorkerLost) for error in lost)  # three workers lost under one request
        assert [n for n in found if isinstance(n, int)] == [n for n in range(2000) if found[n] == n]
        assert len(lost) < 50
        assert await reading == list(range(1000))
        await here.idle()
