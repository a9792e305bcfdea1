"""Training of a model that is cut into stages on workers, by micro-batches. Knows modules' proxies, no message.

Every stage's calls go to its worker in the order of its schedule, ahead of time; a call waits there for what it needs
of its neighbours, which comes from worker to worker.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..schema.errors import Refused, WorkerFailed
from . import graph
from .peer import Pending
from .proxy import RemoteModule
from .schedule import SCHEDULES, Action, Order, bubble, formula, kept, slots
from .tensor import RemoteTensor

Loss = Callable[[RemoteTensor, Any], RemoteTensor]


@dataclass(frozen=True, slots=True)
class Report:
    """What a step was.

    Attributes:
        loss: the mean over all rows.
        bubble: idle slots of all slots, counted from the order in which the stages ran.
        expected: (S - 1)/(M + S - 1).
        orders: what each stage ran, in that order.
        kept: micro-batches whose activations each stage had at the same time, at most.
    """

    loss: float
    bubble: float
    expected: float
    orders: list[Order]
    kept: list[int]

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, bubble {self.bubble:.3f}, (S - 1)/(M + S - 1) = {self.expected:.3f}"


class Pipeline:
    """Stages in a row.

    Args:
        stages: modules on workers; each takes what the one before returns, a tensor.
        loss: from the last stage's output and the targets of a micro-batch to their mean loss; runs at that worker.
            A language model's output are the logits of all tokens: the loss shifts them against the ids.
        schedule: 1f1b or gpipe.

    Raises:
        Refused: no such schedule, or no stage.
    """

    def __init__(self, stages: Sequence[RemoteModule], loss: Loss, schedule: str = "1f1b") -> None:
        if schedule not in SCHEDULES:
            raise Refused(f"there is no schedule {schedule}: use {' or '.join(SCHEDULES)}")
        if not stages:
            raise Refused("a pipeline needs at least one stage")
        self._stages = list(stages)
        self._loss = loss
        self._schedule = SCHEDULES[schedule]

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, micro_batches: int = 4) -> Report:
        """Gradients of the mean loss over a batch, added to those of all stages' parameters.

        Args:
            inputs, targets: [rows, ...] each.
            micro_batches: parts that the rows are cut into.

        Raises:
            Refused: fewer rows than micro-batches, inputs that require grad, or a weight of two stages that trains.
        """
        twice = next((stage for stage in self._stages if stage.flags.get(stage.tied)), None)
        if twice is not None and len(self._stages) > 1:
            raise Refused(
                f"{twice.tied} is a weight of two stages, which would train apart: freeze it, or train by calls"
            )
        rows = len(inputs)
        if inputs.requires_grad:
            raise Refused("a pipeline gives its inputs no gradients: detach() them, or make their origin a stage")
        if not 0 < micro_batches <= rows or len(targets) != rows:
            raise Refused(f"{rows} rows with {len(targets)} targets cannot be cut into {micro_batches} micro-batches")
        run = _Run(self._stages, self._loss, inputs.tensor_split(micro_batches), targets.tensor_split(micro_batches))
        table = slots(self._schedule(len(self._stages), micro_batches))
        for now in zip(*table, strict=True):
            for action in now:
                if action is not None:
                    run.issue(action)
        loss = run.finish()
        orders = run.executed()
        found = slots(orders)
        expected = formula(len(self._stages), micro_batches)
        return Report(loss, bubble(found), expected, orders, [kept(order) for order in orders])


class _Run:
    """One batch."""

    def __init__(
        self, stages: list[RemoteModule], loss: Loss, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
    ) -> None:
        self._stages = stages
        self._loss = loss
        self._inputs = inputs
        self._targets = targets
        self._rows = sum(map(len, inputs))
        self._outputs: dict[tuple[int, int], RemoteTensor] = {}
        self._losses: dict[int, RemoteTensor] = {}
        self._under_way: list[Pending] = []
        for peer in {stage.peer for stage in stages}:
            peer.ask("executed", {})  # what is noted from now on is of this batch

    def issue(self, action: Action) -> None:
        """Sends what the action needs; returns at once."""
        if action.kind == "F":
            self._forward(action)
        else:
            self._backward(action)

    def _forward(self, action: Action) -> None:
        _, stage, m = action
        given = self._outputs[stage - 1, m] if stage else self._inputs[m]
        with torch.enable_grad():
            output = self._stages[stage].call((given,), {}, action.tag)
            if output.record is None:
                raise Refused(f"stage {stage} has no parameters that train, nor any before it: leave it out")
            self._outputs[stage, m] = output
            if stage == len(self._stages) - 1:
                # the engine goes back to here and no further: the stages' own ways back have their places in the order
                end = RemoteTensor(output.handle, output.made, output.slot, graph.content_free())
                self._losses[m] = self._loss(end, self._targets[m]).mul(len(self._inputs[m]) / self._rows)

    def _backward(self, action: Action) -> None:
        _, stage, m = action
        if stage == len(self._stages) - 1:
            with graph.without_waiting(self._under_way):
                self._losses[m].backward()
            self._losses[m] = self._losses[m].detach()
        record = self._outputs.pop((stage, m)).record
        assert record is not None
        self._under_way.append(record.back(tag=action.tag))

    def finish(self) -> float:
        """Waits for all of it; the loss."""
        for pending in self._under_way:
            pending.result()
        return sum(float(loss) for loss in self._losses.values())

    def executed(self) -> list[Order]:
        """What each stage ran, as its worker noted it."""
        tags: list[str] = []
        for peer in dict.fromkeys(stage.peer for stage in self._stages):
            tags += peer.ask("executed", {}).result()[0]["ran"]
        orders: list[Order] = [[] for _ in self._stages]
        for tag in tags:
            stage, _, m = tag[1:].partition(".")
            orders[int(stage)].append(Action(tag[0], int(stage), int(m)))
        if any(len(order) != 2 * len(self._inputs) for order in orders):
            raise WorkerFailed("a stage did not run all micro-batches: see its log")
        return orders
