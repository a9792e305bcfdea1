"""From a cluster file to the processes of each machine. Knows worker options and the planner; starts nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..schema.errors import Refused
from ..schema.plan.model import Load
from ..schema.plan.model import Model as Sizes
from ..schema.plan.plan import Plan, make_plan
from ..schema.plan.slots import Slot, devices_of, read_speeds
from ..workers.generator.encdec import start_of
from ..workers.models import EMBEDDED, resolve
from ..workers.weigh import weigh
from .addresses import is_here
from .file import NAME, Machine, Model, Path_, Source, Value, suggestion

OVER_THE_WIRE: Final = ("echo", "stage", "index", "generator", "encoder", "t5-encoder")
NOT_OVER_THE_WIRE: Final = ("hooks",)  # options that name code


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
    plain = isinstance(options, Mapping) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in options.items()
    )
    if not isinstance(name, str) or not NAME.fullmatch(name) or not plain or not isinstance(options, Mapping):
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


@dataclass(frozen=True, slots=True)
class Layout:
    """What every machine starts, and the plans that decided it."""

    machines: dict[str, list[Task]]
    plans: dict[str, Plan] = field(default_factory=dict)

    def as_map(self) -> dict[str, Any]:
        """`machines` as `ralmq.cluster.publish` takes it."""
        return {name: [task.as_map() for task in tasks] for name, tasks in self.machines.items()}


def lay_out(source: Source, here: str = "") -> Layout:
    """The processes of a file's machines.

    Args:
        here: the machine that this is: its own directories are looked into.

    Raises:
        Refused: a model that does not fit, spans that overlap or leave layers out, a directory that is not there;
            the message names the line.
    """
    layout = Layout({name: [] for name in source.file.machines})
    for name, model in source.file.models.items():
        path = _path(source, model.path)
        sizes = _weighed(source, name, model, here)
        if model.stages:
            _by_hand(source, layout, name, model, path, sizes)
        else:
            _planned(source, layout, name, model, path, sizes)
        center = source.machine(model.generator, ())
        _add(source, layout, center, Task(f"{name}-generator", "generator", {"model": path, "name": name}))
        if _crossed(source, name, model, here):
            _add(source, layout, center, Task(f"{name}-encoder", "t5-encoder", {"model": path, "name": name}))
    for name, index in source.file.indexes.items():
        for machine in index.machines or [source.machine(index.machine, ())]:
            options = {"index": _path(source, index.path), "name": name, **_texts(index.options)}
            _add(source, layout, machine, Task(f"index-{name}", "index", options))
    for number, extra in enumerate(source.file.workers):
        name = extra.name or f"{extra.worker.rpartition(':')[2].lower()}-{number}"
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


def _by_hand(source: Source, layout: Layout, name: str, model: Model, path: str, sizes: Sizes) -> None:
    """Stages as the file has them: without spares they hold each layer once."""
    layers, reached = len(sizes.layers), 0
    spans = []
    for number, stage in enumerate(model.stages):
        place: Path_ = ("models", name, "stages", number)
        first, colon, last = stage.layers.partition(":")
        if not colon or not first.isdecimal() or not last.isdecimal():
            raise source.fault((*place, "layers"), f'{stage.layers!r} are no layers: write layers = "0:{layers}"')
        if not 0 <= int(first) < int(last) <= layers:
            raise source.fault((*place, "layers"), f"layers {stage.layers} do not exist: {name} has 0:{layers}")
        if not stage.spare:
            spans.append((int(first), int(last), number))
        machine = source.machine(stage.machine, (*place, "machine"))
        options = {"model": path, "name": name, "layers": stage.layers, **_stage_options(source, model, machine)}
        if "kv_mib" not in {**model.options, **stage.options}:
            options["kv_mib"] = str(_kv_mib(sizes, model.kv_tokens, int(first), int(last)))
        options |= _texts(stage.options)
        threads = source.file.machines[machine].threads
        _add(source, layout, machine, Task(f"{name}-stage-{number}", "stage", options, threads), place)
    before = None
    for first_, last_, number in sorted(spans):
        place = ("models", name, "stages", number)
        if first_ < reached and before is not None:
            other = model.stages[before[2]]
            raise source.fault(
                place,
                f"layers {first_}:{last_} overlap with {before[0]}:{before[1]} on "
                f"{source.machine(other.machine, ())}: give each layer once, or write spare = true",
            )
        if first_ > reached:
            raise source.fault(place, f"layers {reached}:{first_} of {name} are on no machine: add a stage for them")
        reached, before = last_, (first_, last_, number)
    if reached < layers:
        raise source.fault(("models", name), f"layers {reached}:{layers} of {name} are on no machine: add a stage")


def _planned(source: Source, layout: Layout, name: str, model: Model, path: str, sizes: Sizes) -> None:
    """Stages by the planner: here and now where the memory of all machines is in the file, else by the broker."""
    machines = model.machines or list(source.file.machines)
    slots: list[Slot] = []
    for machine in machines:
        entry = source.file.machines[machine]
        try:
            speeds = read_speeds(str(entry.speed)) if entry.speed else ()
            slots += devices_of(machine, entry.memory, speeds) if entry.memory else [Slot(machine, 0, sum(speeds))]
        except Refused as error:
            raise source.fault(("machines", machine), error.message) from None
    if all(slot.memory for slot in slots):
        try:
            plan = make_plan(sizes, slots, kv_tokens=model.kv_tokens)
        except Refused as error:
            raise source.fault(("models", name), error.message) from None
        layout.plans[name] = plan
        for share in plan.used:
            kv = str(_kv_mib(sizes, model.kv_tokens, share.first, share.last))
            told = {"layers": f"{share.first}:{share.last}", "kv_mib": kv}
            _add_stage(source, layout, name, model, path, share.slot, told)
        return
    if len(slots) == 1 and not slots[0].memory:  # one machine that says nothing of itself: it takes all
        _add_stage(source, layout, name, model, path, slots[0], {"layers": f"0:{len(sizes.layers)}"})
        return
    for slot in slots:
        told = {"stage": f"auto/{len(slots)}", "kv_tokens": str(model.kv_tokens)}
        told |= {"memory": str(slot.memory)} if slot.memory else {}
        told |= {"speed": str(slot.speed)} if slot.speed else {}
        _add_stage(source, layout, name, model, path, slot, told, waits=len(machines) > 1)


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
    if any(other.name == task.name for other in layout.machines[machine]):
        raise source.fault(place, f"two processes of {machine} are called {task.name}: give one of them another name")
    layout.machines[machine].append(task)


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


def _kv_mib(sizes: Sizes, kv_tokens: int, first: int, last: int) -> int:
    return max(1, -(-Load(sizes, -(-kv_tokens // 16) * 16).cache(first, last) >> 20))


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
