"""The worker `stage` with layers that sleep: each STEP takes 20 ms, and no core is needed for it."""

import time
from pathlib import Path
from typing import Any

import torch
from ralmq.workers.stage.worker import Stage


class Sleepy(Stage):
    """Started with `ralmq worker sleepy_stage:Sleepy`, where this file lies."""

    def __init__(self, *, model: Path, stage: str, name: str, ms: float = 20.0, data_plane: str = "hub") -> None:
        super().__init__(model=str(model), stage=stage, name=name, data_plane=data_plane)
        self._seconds = ms / 1000

    async def start(self) -> None:
        await super().start()
        runner = self._runner
        computed, width = runner._computed, runner._span.config.hidden

        def slept(step: Any) -> Any:
            end = time.perf_counter() + self._seconds
            found = computed(step)
            if step.rows:
                time.sleep(max(0.0, end - time.perf_counter()))
            return found

        def forward(rows: Any, x: torch.Tensor, ffn_input: bool = False) -> Any:
            hidden = torch.zeros(len(x), width)
            return (hidden, hidden) if ffn_input else hidden

        runner._computed = slept  # type: ignore[method-assign]
        runner._span.forward = forward  # type: ignore[method-assign, assignment]
