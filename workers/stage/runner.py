"""A stage's computation: one STEP through its layers, and sampling where they are the last. Knows no socket.

Everything here runs in the compute thread, one call after the other.
"""

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...schema.errors import WorkerFailed
from ...schema.message import Active, Error, Step
from ...schema.tensor import Tensor
from ..engine.device import fetch
from ..engine.errors import RankLost
from ..engine.span import Row, Span
from ..engine.t5_span import T5Span
from ..hooks import Hooks
from ..tensors import to_torch
from .cross import cross_rows, onward
from .last import Last, Outcome
from .narrow import narrowed, widened

log = logging.getLogger("ralmq.stage")


class Runner:
    """The layers of one span, and what the last one does with their output.

    Attributes:
        steps: computed so far; `seconds` is the time that those of this pipeline took.
        last: None but where the span is the last one.
    """

    def __init__(self, span: Span, name: str, fingerprint: str, hooks: Hooks | None = None, wire: str = "raw") -> None:
        self.steps = 0
        self.seconds = 0.0
        self._span = span
        self._crossed = isinstance(span, T5Span)
        self._name = name
        self._fingerprint = fingerprint
        self._hooks = hooks
        self._wire = wire
        self.last: Last | None = None
        self.reset()

    @property
    def progress(self) -> int:
        """Grows while a STEP is computed, too: a long prompt takes long."""
        return self.steps + self._span.computed

    def reset(self) -> None:
        """A pipeline is formed, or over: nothing of an earlier one counts."""
        self.seconds = 0.0
        span = self._span
        ahead = span.is_last and span.device.type != "cpu"
        self.last = Last(span, self._fingerprint, self._hooks, ahead) if span.is_last else None

    def run(self, step: Step) -> tuple[Step | None, Outcome]:
        """The STEP for the next stage, None after the last one; and what is to be sent from here.

        Where the computation raises, its rows end with an error to their askers, and all others go on.

        Raises:
            RankLost: no step can be computed any more; that is the stage's end, and no row's fault.
        """
        begun = time.perf_counter()
        try:
            onward, outcome = self._computed(step)
        except RankLost:
            raise
        except Exception as error:
            log.error("a step failed", exc_info=error)
            onward, outcome = self.failed(step, error)
        self.steps += 1
        self.seconds += time.perf_counter() - begun
        return onward, outcome

    def failed(self, step: Step, error: Exception) -> tuple[Step | None, Outcome]:
        """The rows of a STEP fail. Those behind are told that they ended: the last stage gives them back in turn."""
        text = f"a stage of {self._name} failed: {type(error).__name__}: {error}"[:1900]
        said = Error(WorkerFailed.code, f"{text} (its log has the place)")
        ended = (*step.ended, *[Active(row.id, row.attempt) for row in step.rows])
        outcome = Outcome(sent=[(said, (row.id, row.attempt), 0) for row in step.rows])
        if self.last is None:
            return Step(ended=ended, batch=step.batch), outcome
        for key in ended:
            self.last.end((key.id, key.attempt), outcome)
        return None, outcome

    def _computed(self, step: Step) -> tuple[Step | None, Outcome]:
        crossed = self._crossed and bool(step.rows)
        if crossed:
            rows = cross_rows(step, self._span.is_first)
        else:
            rows = [Row(row.position, row.length, list(row.blocks)) for row in step.rows]
        if self.last is None:
            if not rows:
                return step, Outcome()
            hidden = fetch(narrowed(self._span.forward(rows, self._values(step.tensors[0])), self._wire))
            rest = onward(step) if crossed else step.tensors[1:]
            return replace(step, tensors=[hidden, *rest]), Outcome()
        outcome = Outcome()
        self._start(step, self.last)
        if rows:
            outcome = self.last.step(
                step.rows, *self._span.forward(rows, self._values(step.tensors[0]), ffn_input=True)
            )
        for key in step.ended:
            self.last.end((key.id, key.attempt), outcome)
        return None, outcome

    def _values(self, tensor: Any) -> torch.Tensor:
        values = to_torch(tensor) if isinstance(tensor, Tensor) else torch.from_numpy(tensor)
        return values if self._span.is_first else widened(values, self._span.config.hidden)

    def _start(self, step: Step, last: Last) -> None:
        if step.starts:
            prompts = np.asarray(_array(step.tensors[1]), dtype=np.int32)
            begin = 0
            for start in step.starts:
                row = step.rows[start.row]
                last.start((row.id, row.attempt), prompts[begin : begin + start.length].copy(), start.params)
                begin += start.length


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor.numpy() if isinstance(tensor, Tensor) else tensor
