"""`ralmq map`: a file of rows over all replicas of a service. Knows how a row becomes a request, not how it is kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import NoService, Refused
from ..schema.limits import MAX_DEADLINE_MS
from .shared import Broker, Json, Keys, print_json, run

if TYPE_CHECKING:
    from ..client.client import Client
    from ..client.mapping import Mapped

GENERATE: Final = "generate:"
OURS: Final = frozenset(("model", "deadline", "wait_service", "retries", "priority"))
LEAST, MOST = 8, 512  # rows under way, where nobody says how many


def map_file(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A .jsonl file, one request a line.")],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Where the answers go, a line each, in order.")],
    service: Annotated[str, typer.Option("--service", metavar="NAME", help="As echo, or generate:MODEL.")],
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, max=4096, help="Rows under way.  [default: what its workers take]"),
    ] = None,
    deadline: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="Until a row is given up.")] = 600.0,
    wait_service: Annotated[
        float, typer.Option("--wait-service", metavar="SECONDS", help="For a service that is not there yet.")
    ] = 0.0,
    strict: Annotated[bool, typer.Option("--strict", help="End at the first row that fails.")] = False,
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> int | None:
    """Ask a service for each row of a file, over all its workers; call it again to go on after an interruption."""
    found = run(_map(broker, service, source, target, concurrency, deadline, wait_service, strict))
    if as_json:
        told = {"rows": found.rows, "failed": found.failed, "before": found.before}
        print_json({**told, "output": str(target)})
    else:
        before = f", {found.before} of them before" if found.before else ""
        typer.echo(f"{found.rows} rows in {target}{before}; {found.failed} failed")
    return 1 if found.failed else None


async def _map(
    url: str,
    service: str,
    source: Path,
    target: Path,
    concurrency: int | None,
    deadline: float,
    wait_service: float,
    strict: bool,
) -> "Mapped":
    from ..client.client import connect
    from ..client.mapping import map_rows

    if not 0 < deadline < MAX_DEADLINE_MS / 1000 or not wait_service >= 0:
        raise Refused(f"--deadline {deadline:g} --wait-service {wait_service:g}: give seconds above 0, and from 0 on")
    async with connect(url) as client:
        capacity = await _capacity(client, service, wait_service)
        with _progress() as told:
            return await map_rows(
                client,
                _asker(client, service, deadline),
                source,
                target,
                job=service,
                concurrency=concurrency or max(LEAST, min(MOST, capacity)),
                strict=strict,
                told=told,
            )


def _asker(client: "Client", service: str, deadline: float) -> Callable[[dict[str, Any]], Any]:
    """What asks for a row. A service that is lost in between may be back within the row's deadline."""
    from .collected import collected

    async def ask(body: dict[str, Any]) -> Any:
        return await client.request(service, body, deadline=deadline, wait_service=deadline)

    async def generate(body: dict[str, Any]) -> Any:
        options = {name: value for name, value in body.items() if name != "prompt"}
        model = service.removeprefix(GENERATE)
        if not isinstance(body.get("prompt"), str | list):
            raise Refused('a row without a prompt: write {"prompt": "Once"}, or token ids in place of the text')
        if own := OURS & options.keys():
            raise Refused(f"{min(own)} is no option of a row: see `ralmq map --help`")
        try:
            generation = client.generate(
                body["prompt"], model=model, deadline=deadline, wait_service=deadline, **options
            )
        except TypeError as error:
            raise Refused(str(error)) from None
        return await collected(generation, options)

    return generate if service.startswith(GENERATE) else ask


async def _capacity(client: "Client", service: str, wait: float) -> int:
    """Requests that the workers of a service take at a time, once there are some.

    Raises:
        NoService: nobody offers it.
    """
    import asyncio

    end = asyncio.get_running_loop().time() + wait
    while True:
        status = await client.status()
        if status["services"].get(service, {}).get("workers"):
            return sum(worker["capacity"] for worker in status["workers"] if service in worker["services"])
        if asyncio.get_running_loop().time() >= end:
            raise NoService(f"no worker offers {service}: start one, or see `ralmq status` for those that there are")
        await asyncio.sleep(0.1)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, int], None]]:
    """A bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, failed=0)

        def told(done: int, failed: int, rows: int) -> None:
            progress.update(task, completed=done, total=rows, failed=failed)

        yield told
