"""The worker `stage` on a slower machine: a token takes `factor` times as long as it does here without a pause."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ralmq.workers.engine.span import Row, Span
from ralmq.workers.stage.worker import Stage

TIMES = 40
SPARE = 50  # a block of the cache that no sequence of the check gets to


class Slowed(Stage):
    """Started with `ralmq worker slowed_stage:Slowed`, where this file lies."""

    def __init__(self, *, model: Path, layers: str, name: str, factor: float = 1.0, kv_mib: int = 64) -> None:
        super().__init__(model=str(model), layers=layers, name=name, kv_mib=kv_mib)
        self._factor = factor

    async def start(self) -> None:
        await super().start()
        runner = self._runner
        computed, here = runner._computed, 0.0

        def slowed(step: Any) -> Any:
            nonlocal here
            here = here or unslowed(runner._span)  # now: the other stages wait for this one
            begun = time.perf_counter()
            found = computed(step)
            taken = time.perf_counter() - begun
            time.sleep(max(0.0, self._factor * here * sum(row.length for row in step.rows) - taken))
            return found

        runner._computed = slowed  # type: ignore[method-assign]


def unslowed(span: Span) -> float:
    """Seconds of a token, one behind the other: behind a sleep, and beside other stages, it would take longer."""
    hidden = torch.tensor([5]) if span.is_first else torch.zeros(1, span.config.hidden)
    taken = []
    with torch.inference_mode():
        for _ in range(TIMES):
            begun = time.perf_counter()
            out = span.forward([Row(0, 1, [SPARE])], hidden)
            if span.is_last:
                span.head(out)
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
