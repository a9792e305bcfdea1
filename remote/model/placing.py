"""Which layers of a model go to which device of which worker, by bytes. Knows no worker but its name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from ...schema.errors import Refused
from ...schema.plan.model import Load, Model
from ...schema.plan.plan import make_plan
from ...schema.plan.sizes import read_size, size_text
from ...schema.plan.slots import Slot

Size = str | int
Workers = Mapping[str, Size | Mapping[str, Size]]
OWN: Final = ""  # the device on which a worker puts what is put nowhere


@dataclass(frozen=True, slots=True)
class Place:
    """Layers `first` to `last` - 1 on a worker's device, and the bytes that they take there."""

    worker: str
    device: str
    first: int
    last: int
    bytes: int


def slots_of(workers: Workers) -> list[Slot]:
    """The devices in the order in which they are named.

    Raises:
        Refused: no worker, or a size that is none.
    """
    found = []
    if not isinstance(workers, Mapping):
        raise Refused('give each worker its memory: workers={"w1": "8GiB"}')
    for name, memory in workers.items():
        devices = memory if isinstance(memory, Mapping) else {OWN: memory}
        found += [Slot(name, _bytes(name, size), device=device) for device, size in devices.items()]
    if not found:
        raise Refused('name at least one worker with its memory: workers={"w1": "8GiB"}')
    return found


def placed(
    model: Model, slots: Sequence[Slot], kv_tokens: int, *, balanced: bool, no_split: Sequence[tuple[int, int]]
) -> list[Place]:
    """A place for all layers, in the order of the devices.

    Args:
        balanced: the slowest device is as fast as can be, by the bytes that it reads for a token; else each is filled
            before the next.
        no_split: runs of layers, first and last (exclusive), that stay on one device.

    Raises:
        Refused: they do not fit, with by how much; or a run of layers that is none.
    """
    if kv_tokens < 0:
        raise Refused(f"kv_tokens={kv_tokens}: give 0 or more")
    edges = _edges(len(model.layers), no_split)
    kept = Load(model, kv_tokens)
    layers = tuple(sum(model.layers[a:b]) + kept.cache(a, b) for a, b in pairwise(edges))
    reads = tuple(sum(model.reads[a:b]) for a, b in pairwise(edges))
    grouped = replace(model, layers=layers, reads=reads, kv=0)
    if balanced:
        shares = make_plan(grouped, slots, kv_tokens=0, ordered=True).used
        spans = [(share.slot, share.first, share.last) for share in shares]
    else:
        spans = _filled(Load(grouped, 0), slots)
    return [
        Place(slot.name, slot.device, edges[first], edges[last], kept.memory(edges[first], edges[last]))
        for slot, first, last in spans
    ]


def _filled(load: Load, slots: Sequence[Slot]) -> list[tuple[Slot, int, int]]:
    found, first = [], 0
    for slot in slots:
        last = max(end for end in range(first, load.layers + 1) if load.memory(first, end) <= slot.memory)
        if last > first:
            found.append((slot, first, last))
        first = last
    if first < load.layers:
        missing = size_text(load.memory(first, load.layers))
        raise Refused(f"{load.model.name} does not fit: {missing} find no place: give more memory, or another worker")
    return found


def _edges(layers: int, no_split: Sequence[tuple[int, int]]) -> list[int]:
    """Where a cut may be, 0 and the number of layers among them."""
    within: set[int] = set()
    for run in no_split:
        if not _is_run(run) or not 0 <= run[0] < run[1] <= layers:
            raise Refused(
                f"no_split={run!r}: a layer is never split; give runs of layers to keep together, as (0, 2) of {layers}"
            )
        within.update(range(run[0] + 1, run[1]))
    return [edge for edge in range(layers + 1) if edge not in within]


def _is_run(run: Any) -> bool:
    return isinstance(run, Sequence) and len(run) == 2 and all(type(edge) is int for edge in run)


def _bytes(name: str, size: Size) -> int:
    if type(size) not in (int, str):
        raise Refused(f"{name}: {size!r} is no memory: give whole bytes, or a text as 8GiB")
    try:
        found = size if isinstance(size, int) else read_size(size)
    except Refused as error:
        raise Refused(f"{name}: {error.message}") from None
    if found <= 0:
        raise Refused(f"{name}: {size} is no memory: give bytes, or a text as 8GiB")
    return found
