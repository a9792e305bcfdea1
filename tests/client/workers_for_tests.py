"""Workers that the tests of the client ask. Each counts what happens to it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import ralmq
from ralmq.workers.base import Answer, Request


class Gate(ralmq.Worker):
    """Answers once `open` is set; `begun`, `cancelled` and `ended` count its requests."""

    service = "gate"

    def __init__(self, capacity: int = 16, idempotent: bool = False, service: str = "gate") -> None:
        self.capacity = capacity
        self.idempotent = idempotent
        self.service = service
        self.begun = self.cancelled = self.ended = 0
        self.seen: list[int] = []
        self.open = asyncio.Event()

    async def handle(self, request: Request) -> Answer:
        self.begun += 1
        self.seen.append(request.body.get("n", -1))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.ended += 1
        return {"n": request.body.get("n", -1)}


class Count(ralmq.Worker):
    """Streams the numbers below `to`; `produced` counts them by the asker's `name`, `closed` the streams that ended."""

    service = "count"

    def __init__(self, idempotent: bool = True) -> None:
        self.idempotent = idempotent
        self.produced: Counter[str] = Counter()
        self.closed = 0

    async def handle(self, request: Request) -> AsyncIterator[Answer]:
        try:
            for number in range(request.body["to"]):
                self.produced[request.body.get("name", "")] += 1
                yield {"n": number}
                if request.body.get("slow"):
                    await asyncio.sleep(0.001)
            request.ending["last"] = request.body["to"]
        finally:
            self.closed += 1
