"""`ralmq quarantine list|retry` and `ralmq drain`: looking after a running cluster. Knows the broker's own services."""

from typing import Annotated, Any

import typer

from ..schema.address import DEFAULT_BROKER
from .shared import Broker, Json, Keys, print_json, run, show_help

quarantine = typer.Typer(
    help="Requests that were given up because their workers died of them.", invoke_without_command=True
)


@quarantine.callback()
def _root(context: typer.Context) -> None:
    show_help(context)


@quarantine.command("list")
def listed(broker: Broker = DEFAULT_BROKER, keys: Keys = None, as_json: Json = False) -> None:
    """Show them, the oldest first; never what they contain."""
    found = run(_ask(broker, "ralmq.quarantine.list", {}))["quarantine"]
    if as_json:
        print_json(found)
        return
    from rich.console import Console

    from .tables import quarantine_table

    Console().print(quarantine_table(found))


@quarantine.command()
def retry(
    identity: Annotated[str, typer.Argument(metavar="ID", help="As listed, or the beginning of it.")],
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    deadline: Annotated[float, typer.Option("--deadline", min=0.001, help="Seconds.")] = 60.0,
) -> None:
    """Serve one again, alone on its worker, and print the reply."""
    print_json(run(_ask(broker, "ralmq.quarantine.retry", {"id": identity}, deadline)))


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A name of `ralmq status`, or how names begin.")],
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Ask workers to end what they have in hand, and then to end."""
    names = run(_ask(broker, "ralmq.drain", {"worker": worker}))["workers"]
    if as_json:
        print_json({"workers": names})
    else:
        typer.echo(f"asked to drain: {', '.join(names)}")


async def _ask(url: str, service: str, body: dict[str, Any], deadline: float = 10.0) -> dict[str, Any]:
    from ..client.client import connect

    async with connect(url) as client:
        return (await client.request(service, body, deadline=deadline)).body
