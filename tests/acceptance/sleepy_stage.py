"""The worker `stage` whose every call takes 20 ms, most of them asleep, so that cores do not decide."""

import time
from pathlib import Path
from typing import Any

from ralmq.workers.stage.worker import Stage


class Sleepy(Stage):
    """Started with `ralmq worker sleepy_stage:Sleepy`, where this file lies."""

    def __init__(self, *, model: Path, stage: str, name: str, ms: float = 20.0) -> None:
        super().__init__(model=str(model), stage=stage, name=name)
        self._seconds = ms / 1000

    async def start(self) -> None:
        await super().start()
        computed = self._runner._computed

        def slow(step: Any) -> Any:
            end = time.perf_counter() + self._seconds
            found = computed(step)
            if step.rows:
                time.sleep(max(0.0, end - time.perf_counter()))
            return found

        self._runner._computed = slow  # type: ignore[method-assign]
