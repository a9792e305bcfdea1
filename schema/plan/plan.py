"""A plan: which device takes which layers, why, how fast it will be; or what does not fit. Knows no file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..errors import Refused
from .model import Load, Model
from .sizes import size_text
from .slots import Slot, with_speeds
from .spans import STATES, Span, Task, best_spans, furthest

KV_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True)
class Share:
    """Layers `first` to `last` - 1 on one device; equal where it is left out.

    Attributes:
        weights, cache: bytes.
        seconds: of one token.
    """

    slot: Slot
    first: int
    last: int
    weights: int
    cache: int
    seconds: float
    why: str

    @property
    def used(self) -> bool:
        return self.first < self.last


@dataclass(frozen=True, slots=True)
class Plan:
    """Shares in the order of the layers, those left out at the end.

    Attributes:
        measured: whether the speed of every device is known; else times and tokens/s mean nothing.
    """

    load: Load
    shares: tuple[Share, ...]
    measured: bool

    @property
    def used(self) -> tuple[Share, ...]:
        return tuple(share for share in self.shares if share.used)

    @property
    def alone(self) -> float:
        """Tokens/s of one sequence, which passes the stages one after the other."""
        return 1 / sum(share.seconds for share in self.used)

    @property
    def together(self) -> float:
        """Tokens/s of as many sequences as there are stages, one at each: the pace of the slowest."""
        return 1 / max(share.seconds for share in self.used)

    def as_map(self) -> dict[str, Any]:
        """Plain data."""
        shares = [{**asdict(share), "slot": None, **_slot(share.slot)} for share in self.shares]
        for share in shares:
            del share["slot"]
        model = self.load.model
        return {
            "model": model.name,
            "layers": len(model.layers),
            "weights": self.load.weights(0, self.load.layers),
            "kv_tokens": self.load.kv_tokens,
            "stages": shares,
            "tokens_per_s": {"one": self.alone, "each_stage_busy": self.together} if self.measured else None,
        }


def make_plan(
    model: Model, slots: Sequence[Slot], *, kv_tokens: int = KV_TOKENS, ordered: bool = False, states: int = STATES
) -> Plan:
    """The split of all layers over devices whose slowest stage is the fastest.

    Args:
        ordered: the devices hold the layers in the order in which they are named; else in any order.
        states: see `best_spans`.

    Raises:
        Refused: the layers do not fit, or no device is given; the message says by how much.
    """
    if not slots:
        raise Refused("a plan needs a worker: name at least one, with its memory")
    load = Load(model, kv_tokens)
    task = Task(load, with_speeds(slots), 0, load.layers, ordered)
    spans = best_spans(task, states)
    if spans is None:
        raise Refused(_misfit(task, states))
    shares = tuple(_share(task, spans, place) for place in range(len(spans)))
    return Plan(load, shares, all(slot.speed for slot in slots))


def _slot(slot: Slot) -> dict[str, Any]:
    return {"worker": slot.name, "device": slot.device, "memory": slot.memory, "speed": slot.speed}


def _share(task: Task, spans: Sequence[Span], place: int) -> Share:
    span, load = spans[place], task.load
    slot = task.slots[span.slot]
    first, last = span.first, span.last
    seconds = task.seconds(slot, first, last)
    return Share(
        slot, first, last, load.weights(first, last), load.cache(first, last), seconds, _why(task, spans, place)
    )


def _why(task: Task, spans: Sequence[Span], place: int) -> str:
    """What keeps this device from more layers."""
    span, load = spans[place], task.load
    slot = task.slots[span.slot]
    slowest = max(task.seconds(task.slots[other.slot], other.first, other.last) for other in spans)
    if span.first == span.last:
        fits = [first for first in range(task.first, task.last) if load.memory(first, first + 1) <= slot.memory]
        if not fits:
            return "no layer fits its memory"
        least = min(task.seconds(slot, first, first + 1) for first in fits)
        return "one layer would be slower than the slowest stage" if least > slowest else "no split with it is faster"
    if task.seconds(slot, span.first, span.last) >= slowest:
        return "the slowest stage: it sets the pace"
    more = [(span.first - 1, span.last)] if span.first > task.first else []
    more += [(span.first, span.last + 1)] if span.last < task.last else []
    if all(load.memory(*wider) > slot.memory for wider in more):
        return "its memory takes no layer more"
    if all(load.memory(*w) > slot.memory or task.seconds(slot, *w) >= slowest for w in more):
        return "one layer more would make it the slowest"
    return "the rest, spread evenly"


def _misfit(task: Task, states: int) -> str:
    """What does not fit, and by how much."""
    load, name = task.load, task.load.model.name
    weights, cache = load.weights(0, load.layers), load.cache(0, load.layers)
    memory = sum(slot.memory for slot in task.slots)
    parts = f"{size_text(weights)} of weights and {size_text(cache)} of cache for {load.kv_tokens} tokens"
    mend = "add a worker, give more memory, or fewer KV tokens"
    if weights + cache > memory:
        missing = size_text(weights + cache - memory)
        return f"{name} does not fit: {parts} in {size_text(memory)} of memory, {missing} too little: {mend}"
    reached = furthest(task, states)
    if reached == task.first:
        need, most = load.memory(0, 1), max(slot.memory for slot in task.slots)
        what = f"layer 0 and the embedding take {size_text(need)}, the largest device has {size_text(most)}"
        return f"{name} does not fit: {what}, {size_text(need - most)} too little: {mend}"
    rest, spare = load.memory(reached, load.layers), memory - load.memory(0, reached)
    what = (
        f"layers 0 to {reached - 1} of {load.layers} find a place, the rest with the head ({size_text(rest)}) does not"
    )
    return f"{name} does not fit: {parts}; {what}, though {size_text(spare)} are left in pieces: {mend}"
