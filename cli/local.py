"""`ralmq up`, `down`, `logs`: the one cluster of this user on this machine. Knows its record, no process inside."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import Refused
from .background import POLL, clear_logs, detach
from .failures import PREFIX
from .join import show, up_file
from .serve import Insecure, check_bind
from .shared import Keys, run

DOWN_WITHIN: Final = 90.0  # seconds; then the supervisor is killed, and its processes end with it
Settings = dict[str, Any]  # the keyword arguments of local_cluster


def up(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A cluster file; without one, by options.")
    ] = None,
    machine: Annotated[str, typer.Option("--machine", help="Which machine of FILE this is. [default: host]")] = "",
    index: Annotated[list[Path] | None, typer.Option("--index", metavar="DIR", help="An index; repeatable.")] = None,
    model: Annotated[str, typer.Option("--model", help="A model directory, or demo.")] = "demo",
    stages: Annotated[int, typer.Option("--stages", min=1, help="Processes that share the model's layers.")] = 2,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of each stage.")] = 1,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = None,
    bind: Annotated[str, typer.Option("--bind", metavar="URL", help="Address of the broker.")] = DEFAULT_BROKER,
    insecure: Insecure = False,
    keys: Keys = None,
    in_background: Annotated[bool, typer.Option("--detach", "-d", help="Leave it running in the background.")] = False,
) -> None:
    """Start a local cluster: broker, stages, generator, index servers; or what a file says. Ctrl-C ends it."""
    if file is not None:
        if index or model != "demo" or stages != 2 or threads != 1 or port is not None or bind != DEFAULT_BROKER:
            raise Refused(f"what to start is in {file}: give no other options than --machine, --keys, --detach")
        up_file(file, machine, in_background=in_background, keys=keys)
        return
    if machine:
        raise Refused("--machine is one of a cluster file: name the file, too")
    if port is not None:
        if bind != DEFAULT_BROKER:
            raise Refused("--port and --bind both name an address: give one of them")
        bind = f"tcp://127.0.0.1:{port}"
    check_bind(bind, insecure=insecure, keys=keys)
    _check_stages(model, stages)
    paths = [path.expanduser() for path in index or ()]
    if in_background:
        flags = [flag for path in paths for flag in ("--index", str(path))] + (["--insecure"] if insecure else [])
        detach(["up", "--model", model, "--stages", str(stages), "--threads", str(threads), "--bind", bind, *flags])
        return
    shards = [worker for path in paths for worker in _shards(path)]
    whole = [path for path in paths if not _shards(path)]
    settings: Settings = {"model": model, "stages": stages, "threads": threads, "indexes": whole, "bind": bind}
    settings["extra"] = shards
    try:
        run(_up({**settings, "insecure": insecure}))
    except (KeyboardInterrupt, typer.Exit):
        typer.echo("ended")  # being told to stop is how it ends


def _check_stages(model: str, stages: int) -> None:
    """Before any of them is started, since a stage is a process that loads torch."""
    from ..workers.weigh import weigh

    sizes = weigh(model)
    if stages > len(sizes.layers):
        raise Refused(f"--stages {stages}: {sizes.name} has {len(sizes.layers)} layers; give 1 to {len(sizes.layers)}")


def _shards(path: Path) -> list[list[str]]:
    """A server for each shard of an index that is spread over several; none for a whole one."""
    count = sum(place.is_dir() for place in path.glob("shard-*"))
    return [["index", "-o", f"index={path}", "-o", f"shard={shard}/{count}"] for shard in range(count)]


def down() -> None:
    """End the cluster that `ralmq up` started."""
    from ..cluster.record import running, state_directory

    directory = state_directory()
    found = running(directory)
    if found is None:
        typer.echo("no cluster is up")
        return
    try:
        supervisor = os.pidfd_open(found["pid"])
    except ProcessLookupError:
        return  # it ended just now
    with open(supervisor) as handle:
        for number, within in ((signal.SIGTERM, DOWN_WITHIN), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(supervisor, number)
            if select.select([handle], [], [], within)[0]:
                break
    typer.echo("ended")


def logs(
    process: Annotated[str, typer.Argument(metavar="PROCESS", help="One process, such as stage-0.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="The last lines of each.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Show what the processes of `ralmq up` wrote, of the last cluster too."""
    from ..cluster.record import state_directory

    directory = state_directory()
    found = sorted(directory.glob(f"{process or '*'}.log")) if directory.is_dir() else []
    if not found:
        names = ", ".join(sorted(path.stem for path in directory.glob("*.log"))) or "none; start a cluster: `ralmq up`"
        raise Refused(f"no log of {process or 'a cluster'} in {directory}: there is {names}")
    places = dict.fromkeys(found, 0)
    for path in found:
        text = path.read_bytes()
        places[path] = len(text)
        for line in text.decode(errors="replace").splitlines()[-lines:]:
            typer.echo(f"{path.stem} | {line}")
    while follow:
        time.sleep(POLL)
        for line in _new_lines(places):
            typer.echo(line)


def _new_lines(places: dict[Path, int]) -> Iterator[str]:
    """Whole lines that were written since; `places` tells how far each log was read."""
    for path, place in places.items():
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < place:
                place = 0  # a new process began it anew
            file.seek(place)
            whole, newline, _ = file.read().rpartition(b"\n")
        places[path] = place + len(whole) + len(newline)
        if newline:
            yield from (f"{path.stem} | {line}" for line in whole.decode(errors="replace").splitlines())


async def _up(settings: Settings) -> None:
    from ..cluster.local import local_cluster
    from ..cluster.record import holding, state_directory, write
    from ..cluster.supervise import supervise

    directory = state_directory()
    with holding(directory):
        clear_logs(directory)
        async with local_cluster(**settings, directory=directory) as cluster:
            status = await cluster.ready()
            show(cluster, status)

            def record() -> None:
                children = cluster.children.values()
                processes = [{"name": child.name, "pid": child.pid, "log": str(child.log)} for child in children]
                write(directory, {"pid": os.getpid(), "url": cluster.url, "ready": True, "processes": processes})

            record()
            await supervise(cluster, lambda line: typer.echo(f"{PREFIX}{line}", err=True), record)
