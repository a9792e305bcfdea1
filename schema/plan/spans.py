"""Contiguous spans of layers for devices, so that the slowest stage is as fast as it can be. Knows sizes and speeds.

A span is feasible for a device and a bound when it fits its memory and one token takes it no longer than the bound.
Feasibility is monotone: a span within a feasible one is feasible. So for a bound the furthest layer that a set of
devices reaches says all that matters about the set, and dynamic programming over sets, which are counts of devices of
one kind, is exact; the least bound for which all layers are reached is found by bisection over the times of all spans.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .model import Load
from .slots import Slot

STEP: Final = 0.0008  # seconds that a stage spends on a token beside its layers: a hop and its scheduling
LAYER: Final = 4_000_000  # bytes that a device could read while it does what a layer needs beside reading its weights
STATES: Final = 1 << 13  # sets of devices that are looked at; where there are more, see `_reached_by_many`

Reach = list[int]  # by first layer: the last (exclusive) that the device may hold from there on
Order = list[int]  # numbers of devices, in the order of the layers that they hold


@dataclass(frozen=True, slots=True)
class Span:
    """Layers `first` to `last` - 1 on the device number `slot`; none where both are equal."""

    slot: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Task:
    """Layers `first` to `last` - 1 of `load` for `slots`, in their order or in any.

    Attributes:
        held: layers between those two that others have: no span holds them.
    """

    load: Load
    slots: Sequence[Slot]
    first: int
    last: int
    ordered: bool = False
    held: frozenset[int] = frozenset()

    def seconds(self, slot: Slot, first: int, last: int) -> float:
        """Of one token on these layers."""
        if first >= last:
            return 0.0
        return STEP + (self.load.read(first, last) + LAYER * (last - first)) / (slot.speed * 1e9)

    def beyond(self, layer: int) -> int:
        """The first layer from there on that is to be placed."""
        while layer < self.last and layer in self.held:
            layer += 1
        return layer


def best_spans(task: Task, states: int = STATES) -> list[Span] | None:
    """A span for each device, in the order of the layers; empty ones at the end. None where the layers do not fit.

    Of all splits with the fastest slowest stage, and the order of devices that was found for it, it is the one with
    the least sum of squared times: the rest is spread evenly.

    Args:
        states: sets of devices up to which any order is searched exactly.
    """
    kinds = sorted({(slot.memory, slot.speed) for slot in task.slots})
    bounds = sorted(_times(task, kinds))
    low, high, order = 0, len(bounds) - 1, None
    while low <= high:
        middle = (low + high) // 2
        found = _order(task, bounds[middle], states)
        if found is None:
            low = middle + 1
        else:
            order, high = found, middle - 1
    return None if order is None else _even(task, order, bounds[high + 1])


def furthest(task: Task, states: int = STATES) -> int:
    """The layer up to which memory reaches, whatever the speed; task.last where everything fits."""
    return _search(task, float("inf"), states)[0]


def _times(task: Task, kinds: Sequence[tuple[int, float]]) -> set[float]:
    """Of every span that fits, on every kind of device."""
    load, found = task.load, set()
    for memory, speed in kinds:
        slot = Slot("", memory, speed)
        for first in range(task.first, task.last):
            for last in range(first + 1, task.last + 1):
                if last - 1 in task.held or load.memory(first, last) > memory:
                    break
                found.add(task.seconds(slot, first, last))
    return found


def _order(task: Task, bound: float, states: int) -> Order | None:
    reached, order = _search(task, bound, states)
    return order if reached == task.last else None


def _search(task: Task, bound: float, states: int) -> tuple[int, Order]:
    """The layer that all devices together reach within a bound, and an order in which they do."""
    reaches: dict[tuple[int, float], Reach] = {}
    groups: dict[tuple[int, float], list[int]] = {}
    for number, slot in enumerate(task.slots):
        kind = (slot.memory, slot.speed)
        groups.setdefault(kind, []).append(number)
        if kind not in reaches:
            reaches[kind] = [task.beyond(last) for last in _reach(task, slot, bound)]
    if task.ordered:
        place = task.first
        for slot in task.slots:
            place = reaches[slot.memory, slot.speed][place - task.first]
        return place, list(range(len(task.slots)))
    table, members = list(reaches.values()), [groups[kind] for kind in reaches]
    counts = [len(numbers) for numbers in members]
    total = 1
    for count in counts:
        total *= count + 1
    how: Callable[[int, list[Reach], list[int]], tuple[int, list[int]]]
    how = _reached_by_sets if total <= states else _reached_by_many
    place, kinds = how(task.first, table, counts)
    rest = [list(reversed(numbers)) for numbers in members]
    return place, [rest[kind].pop() for kind in kinds]


def _reach(task: Task, slot: Slot, bound: float) -> Reach:
    """For each first layer the furthest last one, by two pointers."""
    found, last = [], task.first
    for first in range(task.first, task.last + 1):
        last = max(first, last)
        while last < task.last and last not in task.held and _feasible(task, slot, first, last + 1, bound):
            last += 1
        found.append(last)
    return found


def _feasible(task: Task, slot: Slot, first: int, last: int, bound: float) -> bool:
    return task.load.memory(first, last) <= slot.memory and task.seconds(slot, first, last) <= bound


def _reached_by_sets(begin: int, reaches: list[Reach], counts: list[int]) -> tuple[int, list[int]]:
    """Exact, over sets of devices: how many of each kind are used. Returns the layer reached, and kinds in order."""
    weights = [1] * len(counts)
    for kind in range(1, len(counts)):
        weights[kind] = weights[kind - 1] * (counts[kind - 1] + 1)
    total = weights[-1] * (counts[-1] + 1)
    far, by = [begin] * total, [0] * total
    for state in range(1, total):
        best = -1
        for kind, weight in enumerate(weights):
            if state // weight % (counts[kind] + 1):
                there = reaches[kind][far[state - weight] - begin]
                if there > best:
                    best, by[state] = there, kind
        far[state] = best
    kinds, state = [], total - 1
    while state:
        kinds.append(by[state])
        state -= weights[by[state]]
    return far[-1], kinds[::-1]


def _reached_by_many(begin: int, reaches: list[Reach], counts: list[int]) -> tuple[int, list[int]]:
    """For more sets than can be looked at: every pair of kinds for the two ends, and between them those first that
    reach furthest behind the first end. Exact where inner layers are alike, since then their order does not matter."""
    best: tuple[int, list[int]] = (-1, [])
    for one in range(len(counts)):
        start = reaches[one][0]
        inner = [kind for kind, count in enumerate(counts) for _ in range(count)]
        inner.remove(one)
        inner.sort(key=lambda kind: -reaches[kind][start - begin])
        for other in dict.fromkeys(inner):
            between = inner.copy()
            between.remove(other)
            kinds = [one, *between, other]
            place = begin
            for kind in kinds:
                place = reaches[kind][place - begin]
            if place > best[0]:
                best = place, kinds
    return best


def _even(task: Task, order: Order, bound: float) -> list[Span]:
    """The spans in this order with the least sum of squared times, none above the bound; dynamic programming."""
    begin, size = task.first, task.last - task.first
    costs = [0.0] + [float("inf")] * size  # by layers covered
    cuts: list[list[tuple[int, int]]] = []
    for number in order:
        slot = task.slots[number]
        reach = _reach(task, slot, bound)
        fresh, cut = costs.copy(), [(begin + place, begin + place) for place in range(size + 1)]
        for place, cost in enumerate(costs):
            if cost == float("inf"):
                continue
            first = begin + place
            for last in range(first + 1, reach[place] + 1):
                squared, there = cost + task.seconds(slot, first, last) ** 2, task.beyond(last) - begin
                if squared < fresh[there]:
                    fresh[there], cut[there] = squared, (first, last)
        costs = fresh
        cuts.append(cut)
    spans, place = [], size
    for number, cut in zip(reversed(order), reversed(cuts), strict=True):
        first, last = cut[place]
        spans.append(Span(number, first, last))
        place = first - begin
    return sorted(spans, key=lambda span: (span.first == span.last, span.first))
