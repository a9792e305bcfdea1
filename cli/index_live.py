"""`ralmq index create | delete | snapshot | use`: indexes that change while they are searched. Knows no index."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import typer

from ..schema.address import DEFAULT_BROKER
from .shared import Broker, Json, Keys, print_json, run

if TYPE_CHECKING:
    from ..client.client import Client

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a served index.")]
LONG: Final = 600.0  # seconds that a snapshot, or the opening of an index, may take

T = TypeVar("T")


def register(group: typer.Typer) -> None:
    """Adds the commands to `ralmq index`."""
    for command in (create, delete, snapshot, use):
        group.command()(command)


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the index is called when it is served.")],
    dim: Annotated[int, typer.Option("--dim", min=1, help="Dimensions of its vectors.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where it is kept.")],
    metric: Annotated[Literal["l2", "ip", "cosine"], typer.Option("--metric", help="How vectors are compared.")] = "l2",
    factory: Annotated[
        str, typer.Option("--factory", help="faiss's string: Flat, IVF1024,SQ8, HNSW32 ...; what vectors become.")
    ] = "Flat",
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder", metavar="NAME", help="The service embed:NAME makes its vectors of text.", show_default=False
        ),
    ] = "",
    shards: Annotated[int, typer.Option("--shards", min=1, max=1024, help="Spread over so many servers.")] = 1,
) -> None:
    """Make an empty index that can be added to, deleted from and searched at once."""
    from ..workers.live.opening import create_live

    place = out.expanduser()
    create_live(place, name=name, dimension=dim, metric=metric, factory=factory, encoder=encoder, shards=shards)
    place_said = "" if shards == 1 else f" -o shard=0/{shards} (and so on)"
    typer.echo(f"{out}: empty, {dim} dimensions ({factory})")
    typer.echo(f"serve it with `ralmq worker index -o index={out}{place_said}`")


def delete(
    name: Name,
    ids: Annotated[list[int], typer.Argument(metavar="ID", min=0, help="Ids to delete.")],
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Delete entries of an index by their ids."""
    done = with_client(broker, lambda client: client.delete(name, ids))
    if as_json:
        print_json({"deleted": done})
    else:
        typer.echo(f"{done} deleted")


def snapshot(name: Name, broker: Broker = DEFAULT_BROKER, keys: Keys = None, as_json: Json = False) -> None:
    """Write a snapshot of an index, which others can serve; it is in the folder `snapshots` of its directory."""
    found = with_client(broker, lambda client: _on_each(client, name, {"snapshot": True}))
    versions = [str(body.get("version", "")) for body in found]
    directories = [str(body.get("directory", "")) for body in found]
    if as_json:
        print_json({"versions": versions, "directories": directories})
        return
    for version, directory in zip(versions, directories, strict=True):
        typer.echo(f"version {version}: {directory or 'in the folder snapshots of the index'}")


def use(
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An index directory that the server can read.")],
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Put another index in the place of a served one, while it is searched: one alike, of other contents."""
    path = str(directory.expanduser().absolute())

    async def both(client: "Client") -> tuple[list[dict[str, Any]], list[int]]:
        bodies = await _on_each(client, name, {"open": path})
        services = (await client.status())["services"]
        return bodies, [services.get(service, {}).get("workers", 1) for service in _services(name, len(bodies))]

    found, servers = with_client(broker, both)
    versions = [str(body.get("version", "")) for body in found]
    before = [str(body.get("before", "")) for body in found]
    if as_json:
        print_json({"versions": versions, "before": before, "changed": len(found), "servers": sum(servers)})
        return
    for service, old, new in zip(_services(name, len(found)), before, versions, strict=True):
        typer.echo(f"{service}: version {old} -> {new}")
    typer.echo(f"{len(found)} of {sum(servers)} servers changed")
    if sum(servers) > len(found):
        typer.echo(f"the others go on with what they had: start them anew with `-o index={directory}`")


async def _on_each(client: "Client", name: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What the shards of an index answer, in their order; one of an index that is whole."""
    import asyncio

    info = (await client.request(f"search:{name}", {"info": True})).body
    asked = [client.request(each, body, deadline=LONG) for each in _services(name, info.get("shards", 1))]
    return [reply.body for reply in await asyncio.gather(*asked)]


def _services(name: str, shards: int) -> list[str]:
    return [f"search:{name}"] if shards == 1 else [f"search:{name}/{shard}" for shard in range(shards)]


def with_client(url: str, call: "Callable[[Client], Awaitable[T]]") -> T:
    """What a call of the client gives."""

    async def main() -> T:
        from ..client.client import connect

        async with connect(url) as client:
            return await call(client)

    return run(main())
