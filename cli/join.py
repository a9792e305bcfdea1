"""`ralmq up FILE` and `ralmq join`: what this machine runs of a cluster. Knows files and keys, no process inside."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ..schema.errors import Refused
from ..schema.keys import KEYS_VARIABLE, broker_key, key_for, read_entries
from .background import clear_logs, detach, joined
from .failures import PREFIX
from .serve import check_bind
from .shared import Keys, check_broker, run

if TYPE_CHECKING:
    from ..cluster.cluster import Cluster
    from ..cluster.file import Source
    from ..cluster.site import Wanted
    from ..cluster.tasks import Layout, Task

WAIT: Final = 30.0  # seconds for the broker of another machine


def join(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", callback=check_broker, help="Address of the broker, as tcp://192.168.1.10:5555."),
    ],
    machine: Annotated[
        str, typer.Option("--machine", metavar="NAME", help="Which one this is of the cluster's file. [default: host]")
    ] = "",
    file: Annotated[Path | None, typer.Option("--file", help="The cluster file, where it is on this machine.")] = None,
    path: Annotated[
        list[str] | None, typer.Option("--path", metavar="MODEL=DIR", help="Where a model is here. Repeatable.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="DIR", help="No cluster file: hold layers that this model lacks.")
    ] = "",
    memory: Annotated[
        str,
        typer.Option("--memory", help="With --model: as 8GiB, or cuda:0:20GiB+cpu:8GiB. [default: most that is free]"),
    ] = "",
    speed: Annotated[
        str, typer.Option("--speed", help="With --model: GB/s, as 12 or 900+12. [default: measured]")
    ] = "",
    keys: Keys = None,
    in_background: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running in the background.")] = False,
) -> None:
    """Run on this machine what the cluster of a broker elsewhere has for it. Ctrl-C ends it."""
    if (memory or speed) and not model:
        raise Refused("--memory and --speed are of what is offered for --model: in a cluster file they are in the file")
    if model and (file or machine):
        raise Refused("--model is for a broker without a cluster file: leave --file and --machine away")
    if path and (file or model):
        raise Refused("--path is for what the broker's plan has for this machine: a file says it as models = {...}")
    key_for(url, None, works=True)  # a fault in them is told before anything starts
    here = machine or socket.gethostname()
    if file is not None:
        up_file(file, machine, in_background=in_background, url=url, keys=keys)
        return
    moved = _moved(path or ())
    offered = _offered(model, memory, speed) if model else None
    origin = f"{url} {'--model ' + str(Path(model).resolve()) if model else here}"

    async def wanted() -> "tuple[list[Task], dict[str, Any]]":
        from ..cluster.site import asked
        from ..cluster.tasks import on_machine

        tasks = await asked(url, here, WAIT, _tell) if offered is None else offered
        return on_machine(tasks, moved), {}

    def now() -> "Sequence[Task]":
        return run(wanted())[0]

    if not _runs_already(origin, now):
        if in_background:
            now()
            told = [("--machine", machine), ("--model", model), ("--memory", memory), ("--speed", speed)]
            flags = [text for name, value in told if value for text in (name, value)]
            detach(["join", url, *flags, *(text for pair in path or () for text in ("--path", pair))])
            return
        _serve({"join": url, "site": here}, wanted, origin, alone=False)


def up_file(file: Path, machine: str, *, in_background: bool, url: str = "", keys: str | None = None) -> None:
    """Starts what a cluster file has for this machine; `url` is where its broker is reached from here.

    Raises:
        Refused: see `read_file` and `lay_out`; or the keys that it names are none.
    """
    from ..cluster.file import read_file
    from ..cluster.tasks import lay_out, on_machine, this_machine

    file = file.expanduser().resolve()
    source = read_file(file)
    here = this_machine(source, machine, socket.gethostname())
    layout = lay_out(source, here)
    center = here == source.center and not url
    _take_keys(source, here, url, keys)
    models = source.file.machines[here].models

    def tasks_of(layout: "Layout") -> "list[Task]":
        return on_machine(layout.machines[here], models)

    if _runs_already(str(file), lambda: tasks_of(layout)):
        return
    if in_background:
        detach(["join", url, "--file", str(file), "--machine", here] if url else ["up", str(file), "--machine", here])
        return

    async def wanted() -> "tuple[list[Task], dict[str, Any]]":
        found = lay_out(read_file(file), here)
        return tasks_of(found), found.as_map() if center else {}

    settings = source.file.cluster
    alone = center and not any(tasks for name, tasks in layout.machines.items() if name != here)
    how: dict[str, Any] = {"bind": settings.bind or settings.broker, "insecure": settings.insecure}
    if not center:
        how = {"join": url or settings.broker}
    others = [name for name, tasks in layout.machines.items() if tasks and name != here] if center else []
    outside = settings.broker if settings.bind else ""
    how |= {"site": "" if alone else here, "outside": outside}
    _serve(how, wanted, str(file), alone=alone, others=others, notes=layout.idle if center else ())


def _take_keys(source: "Source", here: str, url: str, given: str | None) -> None:
    """Puts the keys that the file names where every process finds them; what --keys or $RALMQ_KEYS says goes first."""
    settings, entry, center = source.file.cluster, source.file.machines[here], here == source.center and not url
    place: tuple[str, ...] = ("cluster", "keys") if center and not entry.keys else ("machines", here, "keys")
    named = entry.keys or (settings.keys if center else "")
    if not given and named:
        os.environ[KEYS_VARIABLE] = str((source.path.parent / Path(named).expanduser()).resolve())
    keys = os.environ.get(KEYS_VARIABLE, "")
    try:
        if center:
            bind = settings.bind or settings.broker
            check_bind(bind, insecure=settings.insecure, keys=keys or None)
            if keys and bind.startswith("tcp://"):
                broker_key(Path(keys))
                read_entries(Path(keys))
        else:
            key_for(url or settings.broker, None, works=True)
    except Refused as error:
        raise error if given else source.fault(place, error.message) from None


def _runs_already(origin: str, wanted: Any) -> bool:
    from ..cluster.record import state_directory

    return joined(state_directory(), origin, wanted)


def _moved(pairs: Sequence[str]) -> dict[str, str]:
    """Directories of models by name, from --path."""
    found = {}
    for pair in pairs:
        name, equals, place = pair.partition("=")
        if not equals or not name or not Path(place).expanduser().is_dir():
            raise Refused(f"--path {pair}: give MODEL=DIR, with a directory that is here")
        found[name] = str(Path(place).expanduser().resolve())
    return found


def _offered(model: str, memory: str, speed: str) -> "list[Task]":
    """A stage for each device, whose layers the broker decides."""
    from ..cluster.tasks import Task
    from ..schema.plan.slots import devices_of, read_speeds
    from ..workers.models import resolve
    from ..workers.weigh import weigh

    name, place = resolve(model)
    weigh(model)  # what is no language model is refused here, not by a process once the broker is reached
    speeds = read_speeds(speed) if speed else ()
    tasks = []
    for slot in devices_of(name, memory or "1B", speeds):
        options = {
            "model": model if model == name else str(place),
            "name": name,
            "stage": "auto",
            "device": slot.device,
        }
        options |= {"memory": str(slot.memory)} if memory else {}
        options |= {"speed": str(slot.speed)} if slot.speed else {}
        tasks.append(Task(f"{name}-{slot.device.replace(':', '-')}", "stage", options, waits=True))
    return tasks


def _serve(
    how: dict[str, Any],
    wanted: "Wanted",
    origin: str,
    *,
    alone: bool,
    others: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    try:
        run(_served(how, wanted, origin, alone, others, notes))
    except (KeyboardInterrupt, typer.Exit):
        typer.echo("ended")  # being told to stop is how it ends


async def _served(
    how: dict[str, Any], wanted: "Wanted", origin: str, alone: bool, others: Sequence[str], notes: Sequence[str]
) -> None:
    from ..cluster.cluster import Cluster
    from ..cluster.record import holding, state_directory
    from ..cluster.site import Site

    directory = state_directory()
    with holding(directory):
        clear_logs(directory)
        async with Cluster(directory, **how) as cluster:

            def shown(status: dict[str, Any]) -> None:
                line = f"ralmq join {cluster.outside} --machine"
                show(cluster, status, [*notes, *(f"on {name}: {line} {name}{_flag()}" for name in others)])

            await Site(cluster, wanted, origin=origin, alone=alone, told=_tell).run(shown)


def _tell(line: str) -> None:
    typer.echo(f"{PREFIX}{line}", err=True)


def _flag() -> str:
    return " --keys worker.key" if os.environ.get(KEYS_VARIABLE) else ""


def show(cluster: "Cluster", status: dict[str, Any], notes: Sequence[str] = ()) -> None:
    """What came up, and where; what is to be known besides; and whether it serves."""
    from rich.console import Console

    from .tables import processes

    if cluster.children:
        Console().print(processes({child.name: child.pid for child in cluster.children.values()}, cluster.url, status))
    else:
        typer.echo(f"nothing runs here: the cluster has no layers and no workers for {cluster.site}; Ctrl-C leaves it")
    if cluster.url != DEFAULT_BROKER:
        typer.echo(f"export {BROKER_VARIABLE}={cluster.url}")
    if cluster.outside != cluster.url:
        typer.echo(f"from other machines: {cluster.outside}")
    for note in notes:
        typer.echo(note)
    lacking = cluster.lacking(status)
    typer.echo(f"up at {cluster.url}, not ready yet: {', '.join(lacking)}" if lacking else f"ready at {cluster.url}")
