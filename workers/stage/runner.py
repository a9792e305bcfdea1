"""A stage's computation: one STEP through its layers, and sampling where they are the last. Knows no socket.

Everything here runs in the compute thread, one call after the other.
"""

import time
from typing import Any

import numpy as np
import torch

from ...schema.message import Step
from ...schema.tensor import Tensor
from ..engine.span import Row, Span
from ..tensors import to_torch
from .last import Last, Outcome


class Runner:
    """The layers of one span, and what the last one does with their output."""

    def __init__(self, span: Span, fingerprint: str) -> None:
        self.steps = 0
        self.seconds = 0.0  # spent computing
        self._span = span
        self._fingerprint = fingerprint
        self.last: Last | None = None
        self.reset()

    def reset(self) -> None:
        """A pipeline is formed, or over: nothing of an earlier one counts."""
        self.last = Last(self._span, self._fingerprint) if self._span.is_last else None

    def run(self, step: Step) -> tuple[torch.Tensor | None, Outcome]:
        """Hidden states for the next stage, or None after the last one; and what the last stage sends."""
        begun = time.perf_counter()
        outcome = Outcome()
        hidden: torch.Tensor | None = None
        if self.last is not None:
            self._start(step)
        if step.rows:
            rows = [Row(row.position, row.length, list(row.blocks)) for row in step.rows]
            x = _values(step.tensors[0])
            if self.last is None:
                hidden = self._span.forward(rows, x)
            else:
                outcome = self.last.step(step.rows, *self._span.forward(rows, x, ffn_input=True))
        if self.last is not None:
            for key in step.ended:
                self.last.end((key.id, key.attempt), outcome)
        self.steps += 1
        self.seconds += time.perf_counter() - begun
        return hidden, outcome

    def _start(self, step: Step) -> None:
        assert self.last is not None
        if step.starts:
            prompts = np.asarray(_array(step.tensors[1]), dtype=np.int32)
            begin = 0
            for start in step.starts:
                row = step.rows[start.row]
                self.last.start((row.id, row.attempt), prompts[begin : begin + start.length].copy(), start.params)
                begin += start.length


def _values(tensor: Any) -> torch.Tensor:
    if isinstance(tensor, Tensor):
        return to_torch(tensor)
    return torch.from_numpy(tensor)


def _array(tensor: Any) -> np.ndarray[Any, Any]:
    return tensor.numpy() if isinstance(tensor, Tensor) else tensor
