"""A worker that takes one request after the other, 1 ms each, while the next ones are already in its hand."""

import asyncio

import ralmq
from ralmq.workers.base import Answer, Request


class Steady(ralmq.Worker):
    """Serves `echo`."""

    service = "echo"
    idempotent = True

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def handle(self, request: Request) -> Answer:
        async with self._turn:
            await asyncio.sleep(0.001)
        return request.body
