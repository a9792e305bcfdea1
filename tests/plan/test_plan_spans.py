"""The planner against every split there is, on random instances; and what it says of instances by hand."""

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
from ralmq.schema.plan.model import Load, Model
from ralmq.schema.plan.slots import Slot
from ralmq.schema.plan.spans import STATES, Span, Task, best_spans

INSTANCES = 500


def instance(seed: int) -> Task:
    """1 to 8 layers, alike or not, 1 to 5 devices, some of the same kind, memory from too little to plenty."""
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    sizes = [draw.randint(1, 9)] * count if draw.random() < 0.5 else [draw.randint(1, 9) for _ in range(count)]
    reads = [max(1, size // draw.choice((1, 1, 2))) for size in sizes]
    first, last = draw.randint(0, 9), draw.randint(0, 9)
    shared = draw.choice((0, min(first, last)))
    model = Model("m", _gb(sizes), _gb(reads), draw.randint(0, 2) * 10**8, *_gb([first, last, shared]))
    load = Load(model, draw.choice((0, 1, 10)))
    kinds = [(draw.uniform(0.2, 2.0), draw.choice((1.0, 2.0, 5.0, 100.0))) for _ in range(3)]
    total = load.memory(0, count)
    slots = []
    for number in range(draw.randint(1, 5)):
        share, speed = draw.choice(kinds)
        slots.append(Slot(f"w{number}", int(total * share) // draw.choice((1, 2, 3)) + 1, speed))
    return Task(load, slots, 0, count, ordered=draw.random() < 0.5)


def _gb(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size * 10**9 for size in sizes)


def every_split(task: Task) -> Iterator[list[Span]]:
    """Each way to cut the layers, and each choice of devices for the parts; memory not looked at."""
    for parts in range(1, len(task.slots) + 1):
        for inner in itertools.combinations(range(1, task.load.layers), parts - 1):
            cuts = [0, *inner, task.load.layers]
            choices = itertools.combinations if task.ordered else itertools.permutations
            for chosen in choices(range(len(task.slots)), parts):
                yield [Span(slot, *cuts[place : place + 2]) for place, slot in enumerate(chosen)]


def slowest(task: Task, spans: Sequence[Span]) -> float:
    """Of the slowest stage; infinite where one does not fit."""
    if any(task.load.memory(span.first, span.last) > task.slots[span.slot].memory for span in spans):
        return float("inf")
    return max(task.seconds(task.slots[span.slot], span.first, span.last) for span in spans)


def check_whole(task: Task, spans: Sequence[Span]) -> None:
    """Each device once, each layer once, those in use in order."""
    assert sorted(span.slot for span in spans) == list(range(len(task.slots)))
    used = [span for span in spans if span.first < span.last]
    assert [layer for span in used for layer in range(span.first, span.last)] == list(range(task.load.layers))
    if task.ordered:
        assert [span.slot for span in used] == sorted(span.slot for span in used)


@pytest.mark.parametrize("states", [STATES, 1])
def test_no_split_is_better_than_the_planner_s(states: int) -> None:
    """Exact with sets; the search for many devices, forced here, is exact where inner layers are alike."""
    fitted, missed, worse = 0, 0, 0
    for seed in range(INSTANCES):
        task = instance(seed)
        best = min(slowest(task, spans) for spans in every_split(task))
        found = best_spans(task, states)
        if found is None:
            assert best == float("inf") or states == 1
            worse += best < float("inf")
            missed += best == float("inf")
            continue
        check_whole(task, found)
        fitted += 1
        mine = slowest(task, found)
        assert mine >= best
        alike = len(set(task.load.model.layers)) == 1 and len(set(task.load.model.reads)) == 1
        if states == STATES or task.ordered or alike:
            assert mine == best, f"seed {seed}: {mine} instead of {best}"
        worse += mine > best
    assert fitted > 250 and missed > 50
    assert worse == 0 if states == STATES else worse < 25


def every_split_of_gaps(task: Task) -> Iterator[list[Span]]:
    """Each way to cut the layers that are to be placed, across what others hold always, and each choice of devices."""
    free = [layer for layer in range(task.first, task.last) if layer not in task.held]
    must = {place for place in range(1, len(free)) if free[place] != free[place - 1] + 1}
    may = [place for place in range(1, len(free)) if place not in must]
    for count in range(len(may) + 1):
        for cuts in itertools.combinations(may, count):
            edges = [0, *sorted(must | set(cuts)), len(free)]
            parts = [(free[a], free[b - 1] + 1) for a, b in itertools.pairwise(edges)]
            for chosen in itertools.permutations(range(len(task.slots)), len(parts)):
                yield [Span(slot, *part) for slot, part in zip(chosen, parts, strict=True)]


def test_no_split_of_gaps_is_better_than_the_planner_s() -> None:
    """Layers that others hold are held by nobody else, and a span does not reach across them."""
    fitted = 0
    for seed in range(400):
        whole = instance(seed)
        draw = random.Random(seed)
        first, last = draw.randrange(whole.last), whole.last
        first, last = (0, last) if draw.random() < 0.8 else (first, draw.randint(first + 1, last))
        others = frozenset(layer for layer in range(whole.last) if draw.random() < 0.3)
        held = others - {first, last - 1}
        task = Task(whole.load, whole.slots, first, last, held=held)
        best = min((slowest(task, spans) for spans in every_split_of_gaps(task)), default=float("inf"))
        found = best_spans(task)
        assert (best == float("inf")) == (found is None), f"seed {seed}"
        if found is None:
            continue
        fitted += bool(held & set(range(first, last)))
        used = [layer for span in found for layer in range(span.first, span.last)]
        assert used == [layer for layer in range(first, last) if layer not in held]
        assert slowest(task, found) == best, f"seed {seed}"
    assert fitted > 50


def test_the_search_for_many_is_exact_where_inner_layers_are_alike() -> None:
    """10 devices of which no two are alike, ends unlike the rest: the same pace as all 1,024 sets of them give."""
    for seed in range(20):
        draw = random.Random(seed)
        layers = draw.randint(12, 40)
        model = Model("m", _gb([2] * layers), _gb([2] * layers), 10**7, *_gb([draw.randint(0, 9), draw.randint(0, 9)]))
        load = Load(model, 16)
        share = load.memory(0, layers) / 10
        slots = [Slot(f"w{n}", int(share * draw.uniform(0.7, 2.5)), draw.uniform(1, 9)) for n in range(10)]
        task = Task(load, slots, 0, layers)
        exact, many = best_spans(task), best_spans(task, 1)
        assert (exact is None) == (many is None)
        if exact is not None and many is not None:
            check_whole(task, many)
            assert slowest(task, many) == slowest(task, exact), f"seed {seed}"
