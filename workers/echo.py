"""Sends back what it gets; with a delay it stands in for any slow service. Knows nothing else."""

import asyncio
import random

from .base import Answer, Request, Worker


class Echo(Worker):
    """The built-in worker `echo`.

    Args:
        delay_ms: time to an answer.
        jitter_ms: up to so much more, at random.
        name: the service it offers.
        capacity: requests at a time.
    """

    idempotent = True

    def __init__(
        self, *, delay_ms: float = 0.0, jitter_ms: float = 0.0, name: str = "echo", capacity: int = 64
    ) -> None:
        self.service = name
        self.capacity = capacity
        self._delay = delay_ms / 1000
        self._jitter = jitter_ms / 1000

    async def handle(self, request: Request) -> Answer:
        if self._delay or self._jitter:
            await asyncio.sleep(self._delay + random.uniform(0.0, self._jitter))
        return request.body, request.tensors
