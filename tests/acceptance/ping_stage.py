"""Two stages that compute nothing: the first sends a tensor to the second, has it back, and tells how long it took."""

import asyncio
import statistics
import time
from typing import Any

import numpy as np
import ralmq
from ralmq.schema.frame import RETURN
from ralmq.schema.message import Form, Span, Step
from ralmq.workers.base import Answer, Request
from ralmq.workers.stage.ring import Ring


class Ping(ralmq.Worker):
    """Started with `ralmq worker ping_stage:Ping`, where this file lies.

    Args:
        place: 0 or 1.
        ring: straight, where both have it.
        port: TCP in place of a local socket and shared memory.
    """

    def __init__(self, *, name: str, place: int, ring: bool = False, port: bool = False) -> None:
        self._name, self._place, self._straight, self._port = name, place, ring, port
        self._ring: Ring | None = None
        self._pipeline = b""
        self._back: asyncio.Future[None] | None = None

    @property
    def span(self) -> Span:
        return Span(self._name, "ping", self._place, self._place + 1, 2, 1, 1, 1)

    @property
    def direct(self) -> Any:
        return self._ring.direct if self._ring is not None else None

    async def start(self) -> None:
        if self._straight:
            address = "127.0.0.1" if self._port else ""
            self._ring = Ring(self.host.url, self.take, lambda why: self.host.link.renew(why), self._around, address)
            if self._port:
                self._ring._door.direct = self._ring.direct._replace(near="")

    async def stop(self) -> None:
        if self._ring is not None:
            self._ring.close()

    def take(self, prefix: Any, message: Any) -> None:
        if isinstance(message, Form):
            self._pipeline = prefix.id
            if self._ring is not None:
                self._ring.form(prefix.id, message.onward)
        elif isinstance(message, Step):
            if self._place:
                self._send(Step(batch=message.batch, tensors=message.tensors), RETURN)
            elif self._back is not None:
                self._back.set_result(None)

    def _send(self, step: Step, flags: int = 0) -> None:
        if self._ring is None or not self._ring.send(step, self.host.link.epoch, flags):
            self._around(step, flags)

    def _around(self, step: Step, flags: int) -> None:
        self.host.link.send(step, id=self._pipeline, flags=flags)

    async def handle(self, request: Request) -> Answer:
        """{"bytes", "times"}: the median time there and back in seconds, and how many went straight."""
        tensor = np.zeros(request.body["bytes"], np.uint8)
        took = []
        for number in range(request.body["times"]):
            self._back = asyncio.get_running_loop().create_future()
            begun = time.perf_counter()
            self._send(Step(batch=number, tensors=[tensor]))
            await self._back
            took.append(time.perf_counter() - begun)
        return {"seconds": statistics.median(took), "straight": self._ring.sent if self._ring is not None else 0}
