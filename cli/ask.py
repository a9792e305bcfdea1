"""`ralmq status` and `search`: one question to a running cluster. Knows the client's calls, no message."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ..schema.errors import Refused, WorkerLost
from .shared import Broker, Json, Keys, check_broker, print_json, read_array, run

if TYPE_CHECKING:
    from ..client.results import Hits


def status(
    broker: Annotated[
        str | None,
        typer.Option(
            "--broker",
            metavar="URL",
            callback=check_broker,
            help="[default: $RALMQ_BROKER, else what `ralmq up` started]",
        ),
    ] = None,
    expect: Annotated[
        list[str] | None, typer.Option("--expect", metavar="SERVICE", help="Exit 1 unless it is served; repeatable.")
    ] = None,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Show broker, workers, services and pipelines."""
    url = broker or check_broker(os.environ.get(BROKER_VARIABLE) or None) or _recorded() or DEFAULT_BROKER
    found = run(_status(url))
    if as_json:
        print_json(found)
    else:
        _show_status(url, found)
    if missing := [name for name in expect or () if not found["services"].get(name, {}).get("workers")]:
        raise WorkerLost(f"no worker offers {', '.join(missing)}: start one, or see its log")


def _show_status(url: str, found: dict[str, Any]) -> None:
    from rich.console import Console

    from .tables import status_tables

    console = Console()
    facts = found["broker"]
    console.print(
        f"broker at {url}: up {facts['uptime_s']:.0f} s, {facts['clients']} clients, "
        f"{facts['open_requests']} open requests, {facts['queued_bytes']} bytes queued",
        highlight=False,
        soft_wrap=True,
    )
    for table in status_tables(found):
        console.print(table)


def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="Name of a served index.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Text, or a .npy file of float32 [queries, d].")],
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of each query.")] = 10,
    nprobe: Annotated[
        int | None,
        typer.Option("--nprobe", min=1, help="Lists of an IVF index to look at.  [default: the server's, 8]"),
    ] = None,
    ef: Annotated[
        int | None,
        typer.Option("--ef", min=1, help="Candidates that an HNSW index keeps.  [default: the server's, 64]"),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every vector, as it is stored.")] = False,
    filter: Annotated[
        str | None,
        typer.Option("--filter", metavar="JSON", help='Which payloads count: \'{"lang": "de"}\'.  [default: all]'),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Do without shards that are lost or late.")] = False,
    deadline: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="When it must have ended.")] = 30.0,
    broker: Broker = DEFAULT_BROKER,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Show the nearest entries of an index."""
    asked: Any = query
    if query.endswith(".npy"):
        what = "float32 [queries, d]"
        fault = f"holds no vectors; save {what} or [d]"
        asked = read_array(Path(query).expanduser(), "fiu", (1, 2), what, fault)
    options = {"k": k, "nprobe": nprobe, "ef": ef, "exact": exact, "partial": partial, "deadline": deadline}
    hits, metric = run(_search(broker, index, asked, {**options, "filter": _filter(filter)}))
    if as_json:
        found = {"ids": hits.ids.tolist(), "distances": hits.distances.tolist(), "payloads": hits.payloads}
        print_json({**found, "shards": list(hits.shards)})
        return
    from rich.console import Console

    from .tables import hits_table

    console = Console()
    if (hits.ids < 0).all():
        console.print("nothing found")
    else:
        console.print(hits_table(hits.payloads, hits.ids, hits.distances, metric))
    if hits.coverage < 1:
        console.print(f"shards {hits.shards[0]}/{hits.shards[1]}: the others gave no answer, see `ralmq status`")


async def _status(url: str) -> dict[str, Any]:
    from ..client.client import connect

    async with connect(url) as client:
        return await client.status()


async def _search(url: str, index: str, query: Any, options: dict[str, Any]) -> "tuple[Hits, str]":
    """What was found, and the metric of its distances."""
    from ..client.client import connect

    async with connect(url) as client:
        info = (await client.request(f"search:{index}", {"info": True}, deadline=options["deadline"])).body
        _check_query(index, info, isinstance(query, str))
        return await client.search(index, query, **options), str(info.get("metric", "l2"))


def _check_query(index: str, info: dict[str, Any], text: bool) -> None:
    """Refuses a query of the kind that the index cannot be asked with."""
    if info.get("kind") == "text":
        if not text:
            raise Refused(f"{index} is an index of texts: ask it with words, not with a .npy file")
    elif text and not (info.get("encoder") or info.get("model")):
        raise Refused(
            f"{index} holds vectors and names no encoder of texts: ask it with a .npy file of float32 "
            f"[queries, {info.get('d')}], or build it with --encoder"
        )


def _filter(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Refused(f'--filter: is no JSON ({error}); give a map, as \'{{"lang": "de"}}\'') from None
    if not isinstance(found, dict):
        raise Refused('--filter: is no map; give one, as \'{"lang": "de"}\'')
    return found


def _recorded() -> str:
    from ..cluster.record import running, state_directory

    found = running(state_directory())
    return str(found["url"]) if found else ""
