"""A worker whose answers depend on the row alone, and which notes each row that it is asked for."""

import asyncio
import os

import ralmq


class Square(ralmq.Worker):
    service = "square"
    capacity = 8

    def __init__(self, *, note: str, delay_ms: float = 0.0) -> None:
        self.note = note
        self.delay = delay_ms / 1000

    async def handle(self, request: ralmq.Request) -> dict[str, object]:
        n = request.body["n"]
        line = os.open(self.note, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(line, b"%d\n" % n)  # one write: those of other processes do not come between
        os.close(line)
        await asyncio.sleep(self.delay * (n % 5))  # so that answers come in another order
        if n % 100 == 7:
            raise ValueError(f"{n} is not liked")
        return {"n": n, "square": n * n, "text": f"№ {n}"}
