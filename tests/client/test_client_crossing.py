"""Many requests at once: each answer reaches the one who asked, once."""

import asyncio
from collections import Counter

import pytest
from bursts import Burst
from inprocess import cluster
from ralmq.client.client import Client

CLIENTS = 8
EACH = 1250


@pytest.mark.parametrize("inproc", [False, True])
async def test_two_answers_never_cross(inproc: bool) -> None:
    workers = [Burst(seed=seed) for seed in range(3)]
    got: Counter[tuple[int, int]] = Counter()

    async def ask(client: Client, who: int, number: int, slots: asyncio.Semaphore) -> None:
        async with slots:
            reply = await client.request("burst", {"who": who, "number": number})
        assert reply.body == {"who": who, "number": number}
        got[who, number] += 1

    async with cluster(*workers, inproc=inproc) as here:
        clients = [await here.client() for _ in range(CLIENTS)]
        slots = [asyncio.Semaphore(100) for _ in clients]
        await asyncio.gather(
            *[ask(client, who, n, slots[who]) for n in range(EACH) for who, client in enumerate(clients)]
        )
        await here.idle()
        assert here.counts["accepted"] == CLIENTS * EACH
    assert len(got) == CLIENTS * EACH and set(got.values()) == {1}
    assert sum(worker.served for worker in workers) == CLIENTS * EACH
    assert all(worker.served > EACH for worker in workers)  # the load was shared
