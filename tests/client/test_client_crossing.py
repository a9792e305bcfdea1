"""Many requests at once: each answer reaches the one who asked, once."""

import asyncio
import random
from collections import Counter

import pytest
import ralmq
from inprocess import cluster
from ralmq.client.client import Client
from ralmq.workers.base import Answer, Request

CLIENTS = 8
EACH = 1250


class Burst(ralmq.Worker):
    """Holds its answers back until many have gathered, then gives them in another order."""

    service = "burst"
    capacity = 100

    def __init__(self, seed: int) -> None:
        self.served = 0
        self._random = random.Random(seed)
        self._held: list[asyncio.Future[None]] = []

    async def handle(self, request: Request) -> Answer:
        self.served += 1
        gate = asyncio.get_running_loop().create_future()
        self._held.append(gate)
        if len(self._held) >= self._random.randint(20, 80):
            self._release()
        else:
            asyncio.get_running_loop().call_later(0.02, self._release)
        await gate
        return {"who": request.body["who"], "number": request.body["number"]}

    def _release(self) -> None:
        held, self._held = self._held, []
        self._random.shuffle(held)
        for gate in held:
            if not gate.done():
                gate.set_result(None)


@pytest.mark.parametrize("inproc", [False, True])
async def test_two_answers_never_cross(inproc: bool) -> None:
    workers = [Burst(seed) for seed in range(3)]
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
