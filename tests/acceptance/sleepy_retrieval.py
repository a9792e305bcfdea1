"""The workers `stage` and `index` with service times that sleep: they answer right, and no core is needed for it."""

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from ralmq.workers.base import Answer, Request
from ralmq.workers.search.worker import Index
from ralmq.workers.stage.worker import Stage


class Steps(Stage):
    """Each STEP takes `ms`, or each of its rows does: then nothing is won by computing rows together."""

    def __init__(self, *, model: Path, stage: str, name: str, ms: float, rows: bool = False) -> None:
        super().__init__(model=str(model), stage=stage, name=name, deterministic=8)
        self._seconds = ms / 1000
        self._each = rows

    async def start(self) -> None:
        await super().start()
        runner = self._runner
        computed = runner._computed

        def slept(step: Any) -> Any:
            end = time.perf_counter() + self._seconds * (len(step.rows) if self._each else 1)
            found = computed(step)
            if step.rows:
                time.sleep(max(0.0, end - time.perf_counter()))
            return found

        runner._computed = slept  # type: ignore[method-assign]


class Searches(Index):
    """Each search takes `ms`, give or take `jitter` as a share of that; any number go on at the same time."""

    def __init__(self, *, index: Path, ms: float, jitter: float = 0.0) -> None:
        super().__init__(index=index, recall=0.0)
        self._seconds, self._jitter = ms / 1000, jitter
        self._random = random.Random(1)

    async def handle(self, request: Request) -> Answer:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._seconds * (1 + self._jitter * self._random.uniform(-1, 1))
        found = await super().handle(request)
        if not request.body.get("info"):
            await asyncio.sleep(max(0.0, end - loop.time()))
        return found
