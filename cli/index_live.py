"""`ralmq index create | add | delete | snapshot | use`: indexes that change while they are searched. Knows no index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import Refused
from .shared import Broker, Json, Keys, print_json, read_array, run

if TYPE_CHECKING:
    from ..client.client import Client

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a served index.")]
Ids = Annotated[Path | None, typer.Option("--ids", metavar="FILE", help="A .npy file of int64 [n]; else it gives ids.")]
SHOWN = 10  # ids that are printed where --json is not given


def register(group: typer.Typer) -> None:
    """Adds the commands to `ralmq index`."""
    for command in (create, add, delete, snapshot, use):
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
        str, typer.Option("--encoder", metavar="NAME", help="The service embed:NAME makes its vectors of text.")
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


def add(
    name: Name,
    vectors: Annotated[Path, typer.Argument(metavar="VECTORS", help="A .npy file of float32 [n, d].")],
    ids: Ids = None,
    fields: Annotated[
        Path | None, typer.Option("--fields", metavar="FILE", help="JSON lines: the payload of each vector, a map.")
    ] = None,
    upsert: Annotated[bool, typer.Option("--upsert", help="Replace entries of the same ids.")] = False,
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Add vectors to an index; when this returns they are on the disk and found by every search."""
    given = _array(vectors, "f", 2, "float32 [n, d]")
    numbers = None if ids is None else _array(ids, "iu", 1, "int64 [n]")
    maps = None if fields is None else _maps(fields.expanduser())
    done = _with(broker, lambda client: client.add(name, given, numbers, maps, upsert=upsert, deadline=3600)).tolist()
    if as_json:
        print_json({"ids": done})
        return
    shown = ", ".join(map(str, done[:SHOWN])) + (" ..." if len(done) > SHOWN else "")
    typer.echo(f"{len(done)} added: {shown}")


def delete(
    name: Name,
    ids: Annotated[list[int], typer.Argument(metavar="ID...", min=0, help="Ids to delete.")],
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Delete entries of an index by their ids."""
    done = _with(broker, lambda client: client.delete(name, ids))
    if as_json:
        print_json({"deleted": done})
    else:
        typer.echo(f"{done} deleted")


def snapshot(name: Name, broker: Broker = DEFAULT_BROKER, keys: Keys = None, as_json: Json = False) -> None:
    """Write a snapshot of an index, which others can serve; it is in the folder `snapshots` of its directory."""
    _versions(_with(broker, lambda client: client.snapshot(name)), as_json)


def use(
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An index directory that the server can read.")],
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Put another index in the place of a served one, while it is searched."""
    _versions(_with(broker, lambda client: client.use(name, directory)), as_json)


def _versions(found: list[str], as_json: bool) -> None:
    if as_json:
        print_json({"versions": found})
    else:
        typer.echo("version " + ", ".join(found))


def _with(url: str, call: "Callable[[Client], Any]") -> Any:
    async def main() -> Any:
        from ..client.client import connect

        async with connect(url) as client:
            return await call(client)

    return run(main())


def _array(path: Path, kinds: str, dimensions: int, what: str) -> Any:
    return read_array(path.expanduser(), kinds, (dimensions,), what, f"does not hold {what}; save that")


def _maps(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: cannot be read ({error}); name a file of JSON lines") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise Refused(f"{path}: line {number} is no JSON map; write one for each vector")
        found.append(fields)
    return found
