"""A worker that answers in bursts and in another order; a test may import it, or a process serve it as bursts:Burst."""

import asyncio
import random

import ralmq
from ralmq.workers.base import Answer, Request


class Burst(ralmq.Worker):
    """Holds its answers back until many have gathered, then gives them in another order."""

    service = "burst"
    capacity = 100

    def __init__(self, *, seed: int = 0) -> None:
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
