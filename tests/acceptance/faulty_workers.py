"""Workers that something is wrong with: one that holds the interpreter, one that is slow, one that keeps a record."""

import asyncio
import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import ralmq
from ralmq.schema.message import Partial
from ralmq.workers.base import Answer, Request
from ralmq.workers.search.worker import Index
from sleepy_stage import Sleepy

FIRST = 1 << 21  # numbers that are added up to see how long that takes


class Holding(ralmq.Worker):
    """Holds the interpreter for so many seconds, in one call that does not release it.

    Started with `ralmq worker faulty_workers:Holding`, where this file lies. Each request that it begins with is a
    line of the file `executions`; the answer says how long no other thread of it ran.
    """

    service = "hold"
    idempotent = True  # the broker would give it to another

    async def handle(self, request: Request) -> Answer:
        with Path("executions").open("a") as file:
            file.write(f"{request.id.hex()} {request.attempt}\n")
        return {"held": held(request.body["seconds"]), "attempt": request.attempt}


def held(seconds: float) -> float:
    """Seconds for which the interpreter was held, as seen by another thread."""
    longest, over = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        before = time.perf_counter()
        while not over.wait(0.01):
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        longest = max(longest, time.perf_counter() - before)

    ticking = threading.Thread(target=tick)
    ticking.start()
    spent, count = 0.0, FIRST
    while spent < seconds:  # one call that is long enough, after one that tells how long
        begun = time.perf_counter()
        sum(range(count))
        spent = time.perf_counter() - begun
        count = int(count * 1.1 * max(1.0, seconds / spent))
    over.set()
    ticking.join()
    return longest


class Slow(Index):
    """The worker `index`, 30 ms slower: rows wait for it."""

    def __init__(self, *, index: Path) -> None:
        super().__init__(index=index)

    async def handle(self, request: Request) -> Answer:
        await asyncio.sleep(0.03)
        return await super().handle(request)


class Recording(Sleepy):
    """A sleepy stage that writes a line of JSON to `steps` for each STEP, where it is the last one.

    `at` (time.monotonic), `rows` (ids of requests), `made` (ids of those with a new token), `limits` (of new ones).
    """

    async def start(self) -> None:
        await super().start()
        runner = self._runner
        computed, numbers = runner._computed, itertools.count()

        def recorded(step: Any) -> Any:
            onward, outcome = computed(step)
            if runner.last is not None and step.rows:
                line = {
                    "number": next(numbers),
                    "at": time.monotonic(),
                    "rows": [row.id.hex() for row in step.rows],
                    "made": [key[0].hex() for message, key, _ in outcome.sent if isinstance(message, Partial)],
                    "limits": {step.rows[start.row].id.hex(): start.params["limit"] for start in step.starts},
                }
                with Path("steps").open("a") as file:
                    file.write(json.dumps(line) + "\n")
            return onward, outcome

        runner._computed = recorded  # type: ignore[method-assign]
