"""What runs a worker: start and stop, several services, requests on behalf of others, drain."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ralmq
from inprocess import cluster
from ralmq import errors
from ralmq.broker.limits import Limits
from ralmq.workers.base import Answer, Request
from ralmq.workers.host import Host
from serving import PATIENCE, free_url, until


class Life(ralmq.Worker):
    """Counts its starts and stops."""

    service = "life"

    def __init__(self) -> None:
        self.events: list[str] = []
        self.fail = False

    async def start(self) -> None:
        self.events.append("start")
        if self.fail:
            raise errors.Refused("it cannot start")

    async def stop(self) -> None:
        self.events.append("stop")

    async def handle(self, request: Request) -> Answer:
        self.events.append(request.body["event"])


async def test_start_before_the_first_request_and_stop_after_the_last() -> None:
    life = Life()
    async with cluster() as here:
        host = await here.worker(life)
        client = await here.client()
        assert (await client.request("life", {"event": "asked"})).body == {}
        await host.drain()
        await host.close()  # again: nothing happens
        assert life.events == ["start", "asked", "stop"]
        await until(lambda: not here.in_flight())
        assert here.counts["lost_peers"] == 0


async def test_a_worker_that_cannot_start_or_finds_no_broker() -> None:
    life = Life()
    with pytest.raises(errors.NoBroker):
        await Host(life, free_url()).open(wait=0.1)
    assert life.events == ["start", "stop"]
    life = Life()
    life.fail = True
    with pytest.raises(errors.Refused, match="cannot start"):
        await Host(life, free_url()).open()
    assert life.events == ["start"]
    nameless = Life()
    nameless.service = "ralmq.status"
    async with cluster() as here:
        with pytest.raises(errors.Malformed, match="belong to the broker"):
            await here.worker(nameless)


async def test_workers_of_one_name_and_other_identity_are_refused() -> None:
    def life(identity: str) -> Life:
        made = Life()
        made.identity = identity
        return made

    async with cluster() as here:
        first = await here.worker(life("a"))
        other = life("b")
        with pytest.raises(errors.Refused, match=r"life is served by life-.* \(a; this one: b\).*-o name="):
            await here.worker(other)
        assert other.events == ["start", "stop"]
        await here.worker(life("a"))
        client = await here.client()
        status = await client.status()
        assert [worker["labels"] for worker in status["workers"]] == [{"identity": "a"}] * 2
        before = first.link.hello.nonce
        first.link.renew("a test asks for it")
        peers = here.server.core.roster.peers
        await until(lambda: any(peer.hello.nonce == first.link.hello.nonce != before for peer in peers.values()))
        assert len(here.in_flight()) == 2 and here.counts["other_identity"] == 1


class Two(ralmq.Worker):
    """One worker under two names."""

    labels = {"shard": 3}  # noqa: RUF012
    capacity = 5

    @property
    def services(self) -> tuple[str, ...]:
        return ("left", "right")

    async def handle(self, request: Request) -> Answer:
        loop = asyncio.get_running_loop()
        return {"service": request.service, "left": request.deadline - loop.time(), "id": request.id}


async def test_what_a_worker_knows_of_a_request_and_what_status_shows_of_a_worker() -> None:
    async with cluster(Two()) as here:
        client = await here.client()
        for name in ("left", "right"):
            body = (await client.request(name, deadline=20)).body
            assert body["service"] == name and 0 < body["left"] <= 20 and len(body["id"]) == 16
        status = await client.status()
        [shown] = status["workers"]
        assert shown["name"].startswith("two-") and shown["services"] == ["left", "right"]
        assert (shown["state"], shown["capacity"], shown["labels"]) == ("ready", 5, {"shard": 3})
        assert set(status["services"]) == {"left", "right"}


class Asks(ralmq.Worker):
    """Asks another service on behalf of its own request."""

    service = "asks"

    def __init__(self, deadline: float = 3600.0) -> None:
        self.deadline = deadline
        self.ended: list[str] = []

    async def handle(self, request: Request) -> Answer:
        try:
            if request.body.get("stream"):
                stream = self.host.client.stream("deep", deadline=self.deadline, parent=request.id)
                return {"sum": sum([part.body["n"] async for part in stream])}
            reply = await self.host.client.request(
                "deep", request.body, deadline=self.deadline, parent=request.id, retries=3
            )
            return {"deep": reply.body}
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise


class Deep(ralmq.Worker):
    """Waits for its gate, or streams; `ended` says how."""

    service = "deep"

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = 0
        self.left: list[float] = []
        self.ended: list[str] = []

    async def handle(self, request: Request) -> AsyncIterator[Answer]:
        self.begun += 1
        self.left.append(request.deadline - asyncio.get_running_loop().time())
        try:
            for n in range(10):
                yield {"n": n}
            await self.gate.wait()
            self.ended.append("answered")
            request.ending["deadline"] = self.left[-1]
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise


async def test_a_request_on_behalf_of_another_is_answered() -> None:
    deep, asks = Deep(), Asks()
    deep.gate.set()
    async with cluster(deep, asks) as here:
        client = await here.client()
        reply = await client.request("asks", deadline=25)
        assert 0 < reply.body["deep"]["deadline"] <= 25  # the deadline of the parent, not the hour of its own
        assert (await client.request("asks", {"stream": True}, deadline=25)).body == {"sum": 45}
        assert max(deep.left) <= 25
        await here.idle()


@pytest.mark.parametrize("way", ["cancel", "deadline", "close", "stream"])
async def test_the_end_of_a_request_ends_what_was_asked_on_its_behalf(way: str) -> None:
    deep, asks = Deep(), Asks()
    async with cluster(deep, asks) as here:
        async with ralmq.connect(here.url) as client:
            deadline = 0.5 if way == "deadline" else 30
            task = asyncio.create_task(client.request("asks", {"stream": way == "stream"}, deadline=deadline))
            await until(lambda: deep.begun == 1 and len(here.server.core.requests.open) == 2)
            if way in ("cancel", "stream"):
                task.cancel()
            elif way == "deadline":
                with pytest.raises(errors.DeadlineExceeded):
                    await task
        await asyncio.wait([task])
        assert task.cancelled() == (way in ("cancel", "stream"))
        if way == "close":
            assert isinstance(task.exception(), errors.ConnectionClosed)
        await until(lambda: len(deep.ended) == 1 and len(asks.ended) == 1)
        assert deep.ended == ["CancelledError"]
        await here.idle()


async def test_the_failure_of_a_child_reaches_the_one_who_asked_the_parent() -> None:
    async with cluster(Asks()) as here:
        client = await here.client()
        with pytest.raises(errors.NoService, match="no worker offers deep"):
            await client.request("asks")
        await here.idle()


async def test_nobody_may_ask_on_behalf_of_a_request_that_is_not_theirs() -> None:
    deep = Deep()
    async with cluster(deep, Asks()) as here:
        client, other = await here.client(), await here.client()
        task = asyncio.create_task(client.request("asks"))
        await until(lambda: deep.begun == 1)
        parent = next(iter(here.server.core.requests.open))
        for stranger in (client, other):
            with pytest.raises(errors.RequestCancelled, match="is over"):
                await stranger.request("deep", parent=parent)
        assert deep.begun == 1
        deep.gate.set()
        await task


async def test_drain_finishes_what_is_in_hand_and_takes_nothing_new() -> None:
    deep, other = Deep(), Deep()
    async with cluster(deep) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("deep")) for _ in range(3)]
        await until(lambda: deep.begun == 3)
        draining = asyncio.create_task(here.hosts[0].drain())
        await until(lambda: [w.draining for w in here.server.core.roster.peers.values() if w.works] == [True])
        later = asyncio.create_task(client.request("deep"))
        await until(lambda: here.queued("deep") == 1)
        assert not draining.done()
        deep.gate.set()
        await draining
        assert [bool((await task).body) for task in tasks] == [True] * 3
        other.gate.set()
        await here.worker(other)
        assert (await later).body and (deep.begun, other.begun) == (3, 1)
        await here.idle()


async def test_drain_gives_up_after_its_time() -> None:
    deep = Deep()
    async with cluster(deep) as here:
        client = await here.client()
        task = asyncio.create_task(client.request("deep"))
        await until(lambda: deep.begun == 1)
        await here.hosts[0].drain(within=0.1)
        assert deep.ended == ["CancelledError"]
        with pytest.raises(errors.WorkerLost):
            await task


async def test_drain_ends_when_the_broker_is_gone() -> None:
    deep = Deep()
    async with cluster(deep) as here:
        client = await here.client()
        task = asyncio.create_task(client.request("deep", deadline=1))
        await until(lambda: deep.begun == 1)
        await here.stop()
        async with asyncio.timeout(PATIENCE):
            await here.hosts[0].drain(within=3600)
        assert deep.ended == ["CancelledError"]
        with pytest.raises(errors.DeadlineExceeded):
            await task
        await here.start()


class Stuck(ralmq.Worker):
    """Holds the event loop: no progress."""

    service = "stuck"
    stall_limit = 0.3
    idempotent = True

    def __init__(self) -> None:
        self.begun = self.cancelled = 0
        self.beating = True

    async def handle(self, request: Request) -> Answer:
        self.begun += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def beat(self, beat: Any) -> Any:
        return beat if self.beating else type(beat)(7, beat.busy, beat.active)


async def test_a_worker_without_progress_is_given_up_and_may_come_back() -> None:
    stuck = Stuck()
    async with cluster(stuck, limits=Limits(beat=0.1, tries=1)) as here:
        client = await here.client()
        task = asyncio.create_task(client.request("stuck"))
        await until(lambda: stuck.begun == 1)
        stuck.beating = False
        with pytest.raises(errors.Poisoned, match="no progress"):
            await task
        await until(lambda: stuck.cancelled == 1)
        await until(lambda: len(here.in_flight()) == 1)  # it announced itself again
        await here.idle()


class Mixed(ralmq.Worker):
    """A plain function instead of a coroutine."""

    service = "mixed"

    def handle(self, request: Request) -> Any:
        return {"not": "awaitable"}


class Nothing(ralmq.Worker):
    service = "nothing"


@pytest.mark.parametrize(("worker", "text"), [(Mixed(), "await"), (Nothing(), "has no handle")])
async def test_a_worker_class_that_is_not_finished(worker: ralmq.Worker, text: str) -> None:
    async with cluster(worker) as here:
        with pytest.raises(errors.WorkerFailed, match=text):
            await (await here.client()).request(worker.service)
        await here.idle()
