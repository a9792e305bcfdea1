"""`ralmq index add`: vectors, or texts, to an index that is served. Knows files and the client's calls, no index."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import Refused
from .index_live import LONG, Name, with_client
from .shared import Broker, Json, Keys, print_json, read_array

if TYPE_CHECKING:
    from ..client.client import Client

SHOWN: Final = 10  # ids that are printed where --json is not given
KINDS: Final = (".npy", ".jsonl", ".txt", ".md", ".rst", ".py")


def add(
    name: Name,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Vectors: .npy of float32 [n, d]. Texts: .txt .md .rst .py or a folder, which are cut into passages; "
            "or .jsonl, a map with a text and other fields for each passage.",
        ),
    ],
    ids: Annotated[
        Path | None,
        typer.Option("--ids", metavar="FILE", help="A .npy file of int64 [n].  [default: the index gives ids]"),
    ] = None,
    fields: Annotated[
        Path | None, typer.Option("--fields", metavar="FILE", help="JSON lines: the payload of each vector, a map.")
    ] = None,
    upsert: Annotated[bool, typer.Option("--upsert", help="Replace entries of the same ids.")] = False,
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Add to an index; when this returns it is on the disk and found by every search.

    An index of texts takes texts; one of vectors takes vectors, and texts where it names its encoder.
    """
    source = source.expanduser()
    vectors = maps = None
    if source.suffix == ".npy":
        vectors = _array(source, "f", 2, "float32 [n, d]")
        maps = None if fields is None else _maps(fields.expanduser())
    elif fields is not None:
        raise Refused("--fields belongs to a .npy file of vectors: texts have theirs in the lines of a .jsonl file")
    else:
        maps = _texts(source)
    numbers = None if ids is None else _array(ids.expanduser(), "iu", 1, "int64 [n]")

    async def added(client: "Client") -> Any:
        given = await _vectors(client, name, vectors, maps)
        return await client.add(name, given, numbers, maps, upsert=upsert, deadline=3600)

    done = with_client(broker, added).tolist()
    if as_json:
        print_json({"ids": done})
        return
    shown = ", ".join(map(str, done[:SHOWN])) + (" ..." if len(done) > SHOWN else "")
    typer.echo(f"{len(done)} added: {shown}")


async def _vectors(client: "Client", name: str, vectors: Any, maps: list[dict[str, Any]] | None) -> Any:
    """What is sent: the vectors given, none to an index of texts, or those that its encoder makes of the texts.

    Raises:
        Refused: the index does not hold what is given.
    """
    info = (await client.request(f"search:{name}", {"info": True}, deadline=LONG)).body
    if info.get("kind") == "text":
        if vectors is not None:
            raise Refused(f"{name} is an index of texts: add a .txt or a .jsonl file")
        return None
    if vectors is not None:
        return vectors
    if not info.get("encoder"):
        raise Refused(f"{name} holds vectors and names no encoder of texts: add a .npy file of float32 [n, d]")
    if not info.get("live"):
        raise Refused(f"{name} takes no changes: serve it with -o live=true")
    from ..workers.datastore.encoded import embedded

    return await embedded(client, str(info["encoder"]), [entry["text"] for entry in maps or ()])


def _texts(source: Path) -> list[dict[str, Any]]:
    """Passages as maps with a text each."""
    if source.suffix == ".jsonl":
        found = _maps(source)
        for number, entry in enumerate(found, 1):
            if not isinstance(entry.get("text"), str) or not entry["text"].strip():
                raise Refused(f'{source}: line {number} has no text; write a map such as {{"text": "..."}}')
        if not found:
            raise Refused(f"{source}: holds no line; write a map with a text in each")
        return found
    if source.exists() and not source.is_dir() and source.suffix not in KINDS:
        raise Refused(f"{source}: is no file that can be added; give {', '.join(KINDS)} or a folder of texts")
    from ..workers.datastore.encoded import passage_fields
    from ..workers.datastore.sources import read_documents

    reading = read_documents([source])
    for path in reading.skipped:
        typer.echo(f"left out, not UTF-8 or not readable: {path}", err=True)
    return passage_fields(reading.documents)


def _array(path: Path, kinds: str, dimensions: int, what: str) -> Any:
    return read_array(path, kinds, (dimensions,), what, f"does not hold {what}; save that")


def _maps(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Refused(f"{path}: cannot be read ({reason}); name a file of JSON lines") from None
    found = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise Refused(f"{path}: line {number} is no JSON map; write one for each entry")
        found.append(fields)
    return found
