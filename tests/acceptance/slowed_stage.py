"""The worker `stage` on a slower machine: a STEP takes `factor` times as long as the fastest of its size did."""

import time
from pathlib import Path
from typing import Any

from ralmq.workers.stage.worker import Stage


class Slowed(Stage):
    """Started with `ralmq worker slowed_stage:Slowed`, where this file lies."""

    def __init__(self, *, model: Path, layers: str, name: str, factor: float = 1.0, kv_mib: int = 64) -> None:
        super().__init__(model=str(model), layers=layers, name=name, kv_mib=kv_mib)
        self._factor = factor

    async def start(self) -> None:
        await super().start()
        runner = self._runner
        computed = runner._computed
        fastest: dict[int, float] = {}  # seconds, by tokens of a STEP: what else runs here is not what is slowed

        def slowed(step: Any) -> Any:
            size, begun = sum(row.length for row in step.rows), time.perf_counter()
            found = computed(step)
            taken = time.perf_counter() - begun
            fastest[size] = min(taken, fastest.get(size, taken))
            time.sleep(max(0.0, self._factor * fastest[size] - taken))
            return found

        runner._computed = slowed  # type: ignore[method-assign]
