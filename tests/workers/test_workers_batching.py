"""Batches by count and by wait; each request ends by itself."""

import asyncio
from typing import Any

import numpy as np
import pytest
import ralmq
from inprocess import Cluster, cluster
from ralmq import errors
from ralmq.broker.limits import Limits
from ralmq.workers.base import Answer, Request
from serving import until


class Sums(ralmq.Worker):
    """Adds up a tensor for each request of a batch; what a request's body says goes wrong instead."""

    service = "sums"
    capacity = 64

    def __init__(self, max_batch: int, max_wait: float, capacity: int = 64) -> None:
        self.max_batch, self.max_wait, self.capacity = max_batch, max_wait, capacity
        self.sizes: list[int] = []
        self.cancelled = 0
        self.gate: asyncio.Event | None = None

    async def handle_batch(self, requests: list[Request]) -> list[Answer]:
        self.sizes.append(len(requests))
        ways = [request.body.get("way") for request in requests]
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if "raise" in ways:
            raise ValueError("the whole batch")
        if "few" in ways:
            return [{}] * (len(requests) - 1)
        if "none" in ways:
            return None  # type: ignore[return-value]
        if "cancel" in ways:
            raise asyncio.CancelledError
        return [self._one(request, way) for request, way in zip(requests, ways, strict=True)]

    def _one(self, request: Request, way: Any) -> Answer:
        answers: dict[Any, Answer] = {
            "error": KeyError("this one"),
            "refused": errors.Refused("this one"),
            "bad": [1],
            "object": {"x": object()},
        }
        return answers[way] if way else ({"n": request.body["n"]}, [request.tensors[0].numpy().sum()])


async def ask(here: Cluster, count: int, **ways: str) -> list[Any]:
    """Asks at once; `ways` maps n<number> to what goes wrong."""
    client = await here.client()
    return await asyncio.gather(
        *[client.request("sums", {"n": n, "way": ways.get(f"n{n}")}, tensors=[np.arange(n + 1)]) for n in range(count)],
        return_exceptions=True,
    )


async def test_full_batches_do_not_wait() -> None:
    sums = Sums(max_batch=8, max_wait=3600)
    async with cluster(sums) as here:
        replies = await ask(here, 64)
        assert [reply.body["n"] for reply in replies] == list(range(64))
        assert [reply.tensors[0].numpy().item() for reply in replies] == [n * (n + 1) // 2 for n in range(64)]
        assert sums.sizes == [8] * 8
        await here.idle()


async def test_a_batch_that_does_not_fill_is_served_after_the_wait() -> None:
    sums = Sums(max_batch=8, max_wait=0.5)
    async with cluster(sums) as here:
        assert len(await ask(here, 3)) == 3
        assert sums.sizes == [3]
        assert len(await ask(here, 11)) == 11
        assert sums.sizes == [3, 8, 3]


async def test_without_a_wait_a_batch_takes_what_is_there() -> None:
    sums = Sums(max_batch=16, max_wait=0)
    async with cluster(sums) as here:
        sums.gate = asyncio.Event()
        asking = asyncio.create_task(ask(here, 20))
        await until(lambda: max(here.in_flight().values()) == 20)
        await asyncio.sleep(0.05)
        sums.gate.set()
        assert all(reply.body["n"] == n for n, reply in enumerate(await asking))
        assert sum(sums.sizes) == 20 and max(sums.sizes) <= 16 and len(sums.sizes) <= 3


async def test_the_capacity_is_at_least_one_batch() -> None:
    sums = Sums(max_batch=32, max_wait=3600, capacity=1)
    async with cluster(sums) as here:
        assert len(await ask(here, 32)) == 32
        assert sums.sizes == [32]


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("error", errors.WorkerFailed),
        ("refused", errors.Refused),
        ("bad", errors.WorkerFailed),
        ("object", errors.WorkerFailed),
    ],
)
async def test_one_bad_answer_fails_its_own_request_alone(way: str, kind: type[Exception]) -> None:
    sums = Sums(max_batch=8, max_wait=3600)
    async with cluster(sums) as here:
        replies = await ask(here, 8, n3=way)
        assert sums.sizes == [8]
        assert type(replies[3]) is kind
        assert [reply.body["n"] for n, reply in enumerate(replies) if n != 3] == [0, 1, 2, 4, 5, 6, 7]
        await here.idle()
        assert len(await ask(here, 8)) == 8


@pytest.mark.parametrize(
    ("way", "kind", "text"),
    [
        ("raise", errors.WorkerFailed, "the whole batch"),
        ("few", errors.WorkerFailed, "got 4 requests and returned 3 answers"),
        ("none", errors.WorkerFailed, "returned a NoneType"),
        ("cancel", errors.RequestCancelled, "cancelled"),
    ],
)
async def test_a_batch_that_fails_fails_each_of_its_requests(way: str, kind: type[Exception], text: str) -> None:
    sums = Sums(max_batch=4, max_wait=3600)
    async with cluster(sums) as here:
        replies = await ask(here, 4, n1=way)
        assert [type(reply) for reply in replies] == [kind] * 4 and all(text in str(reply) for reply in replies)
        assert len([reply for reply in await ask(here, 4) if not isinstance(reply, Exception)]) == 4
        await here.idle()


async def test_who_gives_up_leaves_the_others_alone() -> None:
    sums = Sums(max_batch=4, max_wait=3600)
    sums.gate = asyncio.Event()
    async with cluster(sums) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("sums", {"n": n}, tensors=[np.ones(2)])) for n in range(6)]
        await until(lambda: sums.sizes == [4] and max(here.in_flight().values()) == 6)
        for task in (tasks[1], tasks[5]):  # one that is being served, one that waits for its batch to fill
            task.cancel()
        await until(lambda: here.counts["cancelled"] == 2)
        more = [asyncio.create_task(client.request("sums", {"n": n}, tensors=[np.ones(2)])) for n in range(6, 9)]
        await until(lambda: max(here.in_flight().values()) == 7)
        sums.gate.set()
        answered = [task for task in tasks + more if not task.cancelled()]
        assert [(await task).body["n"] for task in answered] == [0, 2, 3, 4, 6, 7, 8]
        assert sums.sizes == [4, 4] and sums.cancelled == 0
        await here.idle()


async def test_a_batch_that_nobody_waits_for_is_cancelled() -> None:
    sums = Sums(max_batch=4, max_wait=3600)
    sums.gate = asyncio.Event()
    async with cluster(sums) as here:
        client = await here.client()
        tasks = [asyncio.create_task(client.request("sums", {"n": n}, tensors=[np.ones(2)])) for n in range(4)]
        await until(lambda: sums.sizes == [4])
        for task in tasks:
            task.cancel()
        await until(lambda: sums.cancelled == 1)
        await here.idle()
        sums.gate.set()
        assert [reply.body["n"] for reply in await ask(here, 4)] == [0, 1, 2, 3]


async def test_closing_a_worker_ends_its_batch() -> None:
    sums = Sums(max_batch=4, max_wait=3600)
    sums.gate = asyncio.Event()
    async with cluster(sums) as here:
        asking = asyncio.create_task(ask(here, 6))
        await until(lambda: sums.sizes == [4] and max(here.in_flight().values()) == 6)
        await here.hosts[0].close()
        assert [type(reply) for reply in await asking] == [errors.WorkerLost] * 6
        assert sums.cancelled == 1


async def test_a_worker_that_forgot_handle_batch_says_so() -> None:
    class Forgetful(ralmq.Worker):
        service = "forgetful"
        max_batch = 2

    async with cluster(Forgetful(), limits=Limits(beat=0.1)) as here:
        with pytest.raises(errors.WorkerFailed, match="no handle_batch"):
            await (await here.client()).request("forgetful")
