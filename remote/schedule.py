"""The order in which each stage of a pipeline runs its micro-batches, and how full the slots are. Knows numbers only.

GPipe: Huang et al. 2019. 1F1B: Narayanan et al. 2019 (PipeDream), with a flush at the end of each batch.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple


class Action(NamedTuple):
    """Forward (`F`) or backward (`B`) of one micro-batch at one stage."""

    kind: str
    stage: int
    micro: int

    @property
    def tag(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro}"


Order = list[Action]
Slots = list[list[Action | None]]


def gpipe(stages: int, micro: int) -> list[Order]:
    """All forwards, then all backwards, the last micro-batch first. Keeps `micro` micro-batches' activations."""
    return [
        [Action("F", stage, m) for m in range(micro)] + [Action("B", stage, m) for m in reversed(range(micro))]
        for stage in range(stages)
    ]


def one_forward_one_backward(stages: int, micro: int) -> list[Order]:
    """Each stage alternates as soon as it can. Stage s keeps at most `stages` - s micro-batches' activations."""
    orders = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micro)
        order = [Action("F", stage, m) for m in range(ahead)]
        for m in range(micro - ahead):
            order += [Action("F", stage, ahead + m), Action("B", stage, m)]
        order += [Action("B", stage, m) for m in range(micro - ahead, micro)]
        orders.append(order)
    return orders


SCHEDULES: Final = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def slots(orders: Sequence[Order]) -> Slots:
    """Which stage does what in which slot, where each action takes one slot and waits for those that it needs.

    Raises:
        ValueError: an order in which some action waits for ever.
    """
    left = [list(order) for order in orders]
    done: set[Action] = set()
    table: Slots = [[] for _ in orders]
    while any(left):
        now: list[Action | None] = []
        for order in left:
            ready = bool(order) and all(need in done for need in _needs(order[0], len(orders)))
            now.append(order.pop(0) if ready else None)
        if not any(now):
            raise ValueError("this order of micro-batches never ends: some wait for each other")
        for row, action in zip(table, now, strict=True):
            row.append(action)
        done.update(action for action in now if action is not None)
    return table


def _needs(action: Action, stages: int) -> list[Action]:
    kind, stage, m = action
    if kind == "F":
        return [Action("F", stage - 1, m)] if stage else []
    return [Action("F", stage, m)] + ([Action("B", stage + 1, m)] if stage + 1 < stages else [])


def bubble(table: Slots) -> float:
    """Slots in which a stage has nothing to do, of all slots."""
    total = sum(map(len, table))
    return sum(action is None for row in table for action in row) / total


def formula(stages: int, micro: int) -> float:
    """What it is for these schedules, where forward and backward take equally long."""
    return (stages - 1) / (micro + stages - 1)


def kept(order: Order) -> int:
    """Micro-batches whose activations a stage keeps at the same time, at most."""
    most = now = 0
    for action in order:
        now += 1 if action.kind == "F" else -1
        most = max(most, now)
    return most
