"""`ralmq status`, `generate`, `search`: one question to a running cluster. Knows the client's calls, no message."""

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ..schema.errors import Refused, WorkerLost
from .shared import Broker, Json, print_json, run

if TYPE_CHECKING:
    from ..client.results import Hits


class Policy(enum.StrEnum):
    """How a generation uses what it retrieves."""

    knn = "knn"


def status(
    broker: Annotated[
        str | None,
        typer.Option("--broker", metavar="URL", help="[default: $RALMQ_BROKER, else what `ralmq up` started]"),
    ] = None,
    expect: Annotated[
        list[str] | None, typer.Option("--expect", metavar="SERVICE", help="Exit 1 unless it is served; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show broker, workers, services and pipelines."""
    url = broker or os.environ.get(BROKER_VARIABLE) or _recorded() or DEFAULT_BROKER
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


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Name of a served model.")],
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0, the default, is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the k likeliest alone.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from so much probability alone.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends it; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    retrieve: Annotated[str | None, typer.Option("--retrieve", metavar="INDEX", help="Retrieve from an index.")] = None,
    policy: Annotated[Policy | None, typer.Option("--policy", help="How what is retrieved is used.")] = None,
    interval: Annotated[int | None, typer.Option("--interval", help="Retrieve each so many tokens.")] = None,
    staleness: Annotated[int | None, typer.Option("--staleness", help="Use the answer of so many tokens ago.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Neighbours of each retrieval.")] = None,
    nprobe: Annotated[int | None, typer.Option("--nprobe", help="Lists of the index to look at.")] = None,
    knn_lambda: Annotated[float | None, typer.Option("--knn-lambda", help="Share of the neighbours, 0 to 1.")] = None,
    knn_temperature: Annotated[float | None, typer.Option("--knn-temperature", help="Flattens distances.")] = None,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds until it is given up.")] = 600.0,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Generate text from a prompt, shown as it comes."""
    retrieval = {
        "policy": policy.value if policy is not None else None,
        "interval": interval,
        "staleness": staleness,
        "k": k,
        "nprobe": nprobe,
        "knn_lambda": knn_lambda,
        "knn_temperature": knn_temperature,
    }
    alone = [name for name, value in retrieval.items() if value is not None]
    if retrieve is None and alone:
        raise Refused(f"--{alone[0].replace('_', '-')} without --retrieve: name the index to retrieve from")
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "ignore_eos": ignore_eos or None,
        "retrieve": retrieve,
        **retrieval,
    }
    if retrieve is not None and as_json:
        options["passages"] = True
    given = {name: value for name, value in options.items() if value is not None}
    document = run(_generate(broker, prompt, model, deadline, given, show=not as_json))
    if as_json:
        print_json(document)


def search(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="Name of a served index.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Text, or a .npy file of float32 [queries, d].")],
    k: Annotated[int, typer.Option("--k", min=1, help="Neighbours of each query.")] = 10,
    nprobe: Annotated[int | None, typer.Option("--nprobe", min=1, help="Lists of the index to look at.")] = None,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Show the nearest entries of an index."""
    asked = _vectors(Path(query).expanduser()) if query.endswith(".npy") else query
    hits = run(_search(broker, index, asked, k, nprobe))
    if as_json:
        print_json({"ids": hits.ids.tolist(), "distances": hits.distances.tolist(), "payloads": hits.payloads})
        return
    from rich.console import Console

    from .tables import hits_table

    Console().print(hits_table(hits.payloads, hits.ids, hits.distances))


async def _status(url: str) -> dict[str, Any]:
    from ..client.client import connect

    async with connect(url) as client:
        return await client.status()


async def _generate(
    url: str, prompt: str, model: str, deadline: float, options: dict[str, Any], *, show: bool
) -> dict[str, Any]:
    from ..client.client import connect

    tokens: list[int] = []
    texts: list[str] = []
    passages: list[dict[str, Any]] = []
    async with connect(url) as client:
        generation = client.generate(prompt, model=model, deadline=deadline, **options)
        async for token in generation:
            texts.append(token.text)
            if token.id >= 0:
                tokens.append(token.id)
            if token.passages:
                passages.append({"position": token.position, "passages": list(token.passages)})
            if show:
                typer.echo(token.text, nl=False)
    if show:
        typer.echo()
    return {
        "text": "".join(texts),
        "tokens": tokens,
        "finish_reason": generation.finish_reason,
        "usage": generation.usage,
        **({"passages": passages} if "retrieve" in options else {}),
    }


async def _search(url: str, index: str, query: Any, k: int, nprobe: int | None) -> "Hits":
    from ..client.client import connect

    async with connect(url) as client:
        return await client.search(index, query, k=k, nprobe=nprobe)


def _vectors(path: Path) -> Any:
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise Refused(f"{path}: no such file; name a .npy file of float32 [queries, d]") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: cannot be read as .npy ({error}); write it with numpy.save") from None
    if not isinstance(found, np.ndarray) or found.ndim not in (1, 2) or found.dtype.kind not in "fiu":
        raise Refused(f"{path}: holds no vectors; save float32 [queries, d] or [d] with numpy.save")
    return found


def _recorded() -> str:
    from ..cluster.record import running, state_directory

    found = running(state_directory())
    return str(found["url"]) if found else ""
