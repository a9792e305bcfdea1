"""From a cluster file to the processes of each machine. Knows worker options and the planner; starts nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeGuard

from ..schema.errors import Refused
from ..schema.plan.model import Load
from ..schema.plan.model import Model as Sizes
from ..schema.plan.plan import Plan, make_plan
from ..schema.plan.slots import Slot
from ..workers.generator.encdec import start_of
from ..workers.models import EMBEDDED, resolve
from ..workers.weigh import weigh
from .addresses import is_here
from .file import NAME, Machine, Model, Path_, Source, Value, suggestion
from .memory import Memory
from .options import check_workers

OVER_THE_WIRE: Final = ("echo", "stage", "index", "generator", "encoder", "t5-encoder")
NOT_OVER_THE_WIRE: Final = ("hooks",)  # options that name code
TAKEN: Final = ("broker", "supervisor")  # names of logs that no worker may have


@dataclass(frozen=True, slots=True)
class Task:
    """One process: `ralmq worker WORKER -o key=value ...`.

    Attributes:
        name: within its machine; of its log, and shown in `ralmq status`.
        waits: for stages of other machines, before it serves.
    """

    name: str
    worker: str
    options: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    waits: bool = False

    def as_map(self) -> dict[str, Any]:
        """Plain data; `task_of` is the way back."""
        return asdict(self)

    @property
    def flags(self) -> list[str]:
        return [flag for key, value in self.options.items() for flag in ("-o", f"{key}={value}")]


def task_of(body: Any) -> Task:
    """A task that came over the wire.

    Raises:
        Refused: it is none, or one that is started from a file on its own machine alone.
    """
    if not isinstance(body, Mapping):
        raise Refused("the broker's plan has an entry that is no map: start both sides with the same version")
    name, worker, options, threads = (body.get(key) for key in ("name", "worker", "options", "threads"))
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN or not _plain(options):
        raise Refused(
            "the broker's plan has an entry without a name or options: start both sides with the same version"
        )
    if worker not in OVER_THE_WIRE:
        raise Refused(
            f"the broker's plan starts {worker!r:.60} here, and only built-in workers are started that way: "
            "copy the cluster file to this machine and give --file"
        )
    if code := [key for key in options if key in NOT_OVER_THE_WIRE]:
        raise Refused(f"the broker's plan sets -o {code[0]} here, which names code: copy the file and give --file")
    if type(threads) is not int or not 0 < threads <= 1024:
        raise Refused(
            "the broker's plan has an entry with no number of threads: start both sides with the same version"
        )
    return Task(name, str(worker), dict(options), threads, body.get("waits") is True)


def _plain(options: Any) -> TypeGuard[Mapping[str, str]]:
    """Whether they are names and texts; `-o NAME=TEXT` is cut at the first =, so a name that has one is another's."""
    return isinstance(options, Mapping) and all(
        isinstance(key, str) and key.isidentifier() and isinstance(value, str) for key, value in options.items()
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """What every machine starts, and the plans that decided it."""

    machines: dict[str, list[Task]]
    plans: dict[str, Plan] = field(default_factory=dict)

    @property
    def idle(self) -> list[str]:
        """A line for each device that a plan leaves without layers."""
        return [
            f"{_called(share.slot)} gets no layers of {name}: {share.why}"
            for name, plan in self.plans.items()
            for share in plan.shares
            if not share.used
        ]

    def as_map(self) -> dict[str, Any]:
        """`machines` as `ralmq.cluster.publish` takes it."""
        return {name: [task.as_map() for task in tasks] for name, tasks in self.machines.items()}


def lay_out(source: Source, here: str = "") -> Layout:
    """The processes of a file's machines.

    Args:
        here: the machine that this is: its own directories are looked into. Where it has no part of any model, and does
            not run the broker, none is looked at, and what others start is left out.

    Raises:
        Refused: a worker or an option that there is not, a model that does not fit, spans that overlap or leave layers
            out, a directory that is not there; the message names the line.
    """
    check_workers(source)
    layout = Layout({name: [] for name in source.file.machines})
    memory = Memory(source)
    models = source.file.models
    if here not in ("", source.center) and not any(_concerns(source, model, here) for model in models.values()):
        models = {}
    for name, model in sorted(models.items(), key=lambda item: memory.rank(item[1])):
        path = _path(source, model.path)
        sizes = _weighed(source, name, model, here)
        if model.stages:
            _by_hand(source, layout, memory, name, model, path, sizes)
        else:
            _planned(source, layout, memory, name, model, path, sizes)
        center = source.machine(model.generator, ())
        _add(source, layout, center, Task(f"{name}-generator", "generator", {"model": path, "name": name}))
        if _crossed(source, name, model, here):
            threads = source.file.machines[center].threads
            options = {"model": path, "name": name, "threads": str(threads)}
            _add(source, layout, center, Task(f"{name}-encoder", "t5-encoder", options, threads))
    for name, index in source.file.indexes.items():
        for machine in index.machines or [source.machine(index.machine, ())]:
            options = {"index": _path(source, index.path), "name": name, **_texts(index.options)}
            _add(source, layout, machine, Task(f"index-{name}", "index", options))
    for number, extra in enumerate(source.file.workers):
        name = extra.name or f"{extra.worker.rpartition(':')[2].lower()}-{number}"
        if not NAME.fullmatch(name):
            raise source.fault(("workers", number), f"{extra.worker!r} gives no name: write name = ... for its process")
        task = Task(name, extra.worker, _texts(extra.options), extra.threads)
        _add(source, layout, source.machine(extra.machine, ()), task, ("workers", number))
    return layout


def on_machine(tasks: Sequence[Task], models: Mapping[str, str]) -> list[Task]:
    """The tasks with paths of this machine: its own home folder, and models that it has elsewhere, by their names."""
    changed = []
    for task in tasks:
        options = dict(task.options)
        if "model" in options:
            options["model"] = models.get(options.get("name", ""), options["model"])
        for key in ("model", "index"):
            if options.get(key, "").startswith("~"):
                options[key] = str(Path(options[key]).expanduser())
        changed.append(replace(task, options=options))
    return changed


def _by_hand(source: Source, layout: Layout, memory: Memory, name: str, model: Model, path: str, sizes: Sizes) -> None:
    """Stages as the file has them."""
    spans = [_span(source, name, number, stage.layers, len(sizes.layers)) for number, stage in enumerate(model.stages)]
    _check_whole(source, name, model, spans, len(sizes.layers))
    for number, stage in enumerate(model.stages):
        place: Path_ = ("models", name, "stages", number)
        machine = source.machine(stage.machine, (*place, "machine"))
        options = {"model": path, "name": name, "layers": stage.layers, **_stage_options(source, model, machine)}
        options |= _texts(stage.options)
        memory.book(machine, options, Load(sizes, model.kv_tokens), spans[number], place)
        threads = source.file.machines[machine].threads
        _add(source, layout, machine, Task(f"{name}-stage-{number}", "stage", options, threads), place)


def _span(source: Source, name: str, number: int, text: str, layers: int) -> tuple[int, int]:
    place = ("models", name, "stages", number, "layers")
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal():
        raise source.fault(place, f'{text!r} are no layers: write layers = "0:{layers}"')
    if not 0 <= int(first) < int(last) <= layers:
        raise source.fault(place, f"layers {text} do not exist: {name} has 0:{layers}")
    return int(first), int(last)


def _check_whole(source: Source, name: str, model: Model, spans: Sequence[tuple[int, int]], layers: int) -> None:
    """Without spares the stages hold each layer once."""
    reached, before = 0, 0
    for number in sorted(range(len(spans)), key=lambda number: spans[number]):
        if model.stages[number].spare:
            continue
        place, (first, last) = ("models", name, "stages", number), spans[number]
        if first < reached:
            other, machine = model.stages[before].layers, source.machine(model.stages[before].machine, ())
            what = f"layers {first}:{last} overlap with {other} on {machine}"
            raise source.fault(place, f"{what}: give each layer once, or write spare = true")
        if first > reached:
            raise source.fault(place, f"layers {reached}:{first} of {name} are on no machine: add a stage for them")
        reached, before = last, number
    if reached < layers:
        raise source.fault(("models", name), f"layers {reached}:{layers} of {name} are on no machine: add a stage")


def _planned(source: Source, layout: Layout, memory: Memory, name: str, model: Model, path: str, sizes: Sizes) -> None:
    """Stages by the planner: here and now where the memory of all machines is in the file, else by the broker."""
    slots = memory.slots(model)
    if all(slot.memory for slot in slots):
        try:
            plan = make_plan(sizes, memory.left_of(slots), kv_tokens=model.kv_tokens)
        except Refused as error:
            raise source.fault(("models", name), error.message) from None
        layout.plans[name] = plan
        for share in plan.used:
            memory.take(share.slot, share.weights + share.cache)
            told = {"layers": f"{share.first}:{share.last}", "kv_mib": str(plan.load.kv_mib(share.first, share.last))}
            _add_stage(source, layout, name, model, path, share.slot, told)
        return
    if len(slots) == 1 and not slots[0].memory:  # one machine that says nothing of itself: it takes all
        kv = Load(sizes, model.kv_tokens).kv_mib(0, len(sizes.layers))
        _add_stage(source, layout, name, model, path, slots[0], {"layers": f"0:{len(sizes.layers)}", "kv_mib": str(kv)})
        return
    for slot in slots:
        told = {"stage": f"auto/{len(slots)}", "kv_tokens": str(model.kv_tokens)}
        told |= {"memory": str(memory.part(slot))} if slot.memory else {}
        told |= {"speed": str(slot.speed)} if slot.speed else {}
        _add_stage(source, layout, name, model, path, slot, told, waits=len({slot.name for slot in slots}) > 1)


def _add_stage(
    source: Source,
    layout: Layout,
    name: str,
    model: Model,
    path: str,
    slot: Slot,
    told: Mapping[str, str],
    waits: bool = False,
) -> None:
    machine = slot.name
    options = {"model": path, "name": name, **told, **_stage_options(source, model, machine)}
    if slot.device != "cpu":
        options["device"] = slot.device
    called = f"{name}-{slot.device.replace(':', '-')}"
    threads = source.file.machines[machine].threads
    _add(source, layout, machine, Task(called, "stage", options, threads, waits), ("models", name))


def _stage_options(source: Source, model: Model, machine: str) -> dict[str, str]:
    entry = source.file.machines[machine]
    options = {"threads": str(entry.threads)}
    if model.dtype != "fp32":
        options["dtype"] = model.dtype
    if source.file.cluster.data_plane != "hub":
        options["data_plane"] = source.file.cluster.data_plane
        options |= {"address": entry.address} if entry.address else {}
    return {**options, **_texts(model.options)}


def _add(source: Source, layout: Layout, machine: str, task: Task, place: Path_ = ()) -> None:
    if task.name in TAKEN:
        raise source.fault(place, f"{task.name} is the name of a process of the cluster itself: give another one")
    if any(other.name == task.name for other in layout.machines[machine]):
        raise source.fault(place, f"two processes of {machine} are called {task.name}: give one of them another name")
    layout.machines[machine].append(task)


def _called(slot: Slot) -> str:
    return slot.name if slot.device == "cpu" else f"{slot.device} of {slot.name}"


def _concerns(source: Source, model: Model, machine: str) -> bool:
    told = [stage.machine or source.center for stage in model.stages]
    return machine in (*(told or model.machines or source.file.machines), model.generator)


def _weighed(source: Source, name: str, model: Model, here: str) -> Sizes:
    try:
        return weigh(_local(source, name, model, here), model.dtype, name)
    except Refused as error:
        raise source.fault(("models", name, "path"), error.message) from None


def _crossed(source: Source, name: str, model: Model, here: str) -> bool:
    return start_of(resolve(_local(source, name, model, here))[1]) is not None


def _local(source: Source, name: str, model: Model, here: str) -> str:
    """The directory of a model on this machine."""
    elsewhere = source.file.machines.get(here, Machine()).models.get(name)
    return _path(source, elsewhere or model.path)


def _path(source: Source, text: str) -> str:
    """A path of the file: from its folder, where it is not absolute."""
    if text == EMBEDDED or text.startswith("~"):
        return text
    return str((source.path.parent / text).resolve())


def _texts(options: Mapping[str, Value]) -> dict[str, str]:
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in options.items()}


def this_machine(source: Source, given: str, host: str) -> str:
    """The machine of the file that this one is: the one given, else that whose name, host or address this one has.

    Raises:
        Refused: there is none.
    """
    names = list(source.file.machines)
    if given:
        if given not in names:
            raise Refused(f"{source.path}: no machine is called {given!r}{suggestion(given, names)}")
        return given
    short = host.partition(".")[0]
    for name, machine in source.file.machines.items():
        if {name, machine.host, machine.host.partition(".")[0]} & {host, short}:
            return name
    for name, machine in source.file.machines.items():
        if is_here(machine.host):
            return name
    if len(names) == 1:
        return names[0]
    raise Refused(f"{source.path}: this host is called {host}, and none of {', '.join(names)} is: say --machine NAME")
