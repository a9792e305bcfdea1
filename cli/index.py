"""`ralmq index build`: texts or vectors in, an index directory out, with a progress bar. Knows no index."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from ..schema.errors import Refused
from .index_live import register
from .shared import Keys, run, show_help, without_keys

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..workers.index.manifest import Manifest

index = typer.Typer(help="Indexes of your own texts and vectors.", invoke_without_command=True, rich_markup_mode=None)
register(index)
MAX_THREADS: Final = 4  # of the stage that a build starts; a small model gains nothing from more


@index.callback()
def _group(context: typer.Context) -> None:
    """Indexes of your own texts and vectors."""
    show_help(context)


@index.command()
def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the index is called when it is served.")],
    source: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help=".txt .md .rst .py files or folders; or one .npy file of vectors."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the index is written.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The model whose states are indexed: a directory, or demo.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Index the words of the texts (BM25); no model.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Index so many tokens at most.")] = None,
    factory: Annotated[
        str | None, typer.Option("--factory", help="faiss's index string: Flat, IVF1024,Flat, IVF1024,PQ32, HNSW32 ...")
    ] = None,
    metric: Annotated[Literal["l2", "ip", "cosine"], typer.Option("--metric", help="How vectors are compared.")] = "l2",
    shards: Annotated[int, typer.Option("--shards", min=1, help="Spread it over so many servers.")] = 1,
    by: Annotated[
        Literal["rows", "list"], typer.Option("--by", help="Spread entries in turn, or whole lists of an IVF index.")
    ] = "rows",
    fields: Annotated[
        Path | None, typer.Option("--fields", metavar="JSONL", help="With vectors: their payload fields, a line each.")
    ] = None,
    encoder: Annotated[
        str, typer.Option("--encoder", metavar="NAME", help="With vectors: what made them, served as embed:NAME.")
    ] = "",
    broker: Annotated[
        str | None,
        typer.Option("--broker", metavar="URL", help="A cluster that serves the model; else one is started."),
    ] = None,
    keys: Keys = None,
) -> None:
    """Build an index of a model's hidden states over texts, of their words, or of vectors."""
    sources, out = [path.expanduser() for path in source], out.expanduser()
    how = {"factory": factory, "metric": metric, "shards": shards, "by": by, "threads": _threads()}
    vectors = [path for path in sources if path.suffix == ".npy"]
    if bool(vectors) + text + (model is not None) != 1 or (vectors and len(sources) > 1):
        raise Refused("give texts with --model, texts with --text, or one .npy file of vectors with neither")
    if not vectors and (fields or encoder):
        raise Refused("--fields and --encoder belong to a .npy file of vectors: leave them out")
    if text and (factory or metric != "l2" or shards > 1 or by != "rows"):
        raise Refused("--factory, --metric, --shards and --by are of vectors: leave them out for an index of texts")
    if text:
        _texts(name, sources, out)
    else:
        made = (
            run(_datastore(name, sources, model, out, max_tokens, broker, how))
            if model is not None
            else _vectors(name, vectors[0], out, fields, encoder, how)
        )
        typer.echo(f"{out}: {made.total} entries of {made.dimension} dimensions ({made.factory})")
    if shards > 1:
        typer.echo(f"serve each shard i with `ralmq worker index -o index={out} -o shard=i/{shards}`")
    else:
        typer.echo(f"serve it with `ralmq up --index {out}` or `ralmq worker index -o index={out}`")


def _threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


def _vectors(name: str, source: Path, out: Path, fields: Path | None, encoder: str, how: dict[str, Any]) -> "Manifest":
    from ..workers.index.vectors import read_fields, read_vectors
    from ..workers.index.writer import write_vectors

    with _bars() as shown:
        return write_vectors(
            out,
            name=name,
            vectors=read_vectors(source),
            fields=None if fields is None else read_fields(fields.expanduser()),
            encoder=encoder,
            sources=[str(source)],
            progress=shown,
            **how,
        )


def _texts(name: str, sources: list[Path], out: Path) -> None:
    from ..workers.datastore.sources import read_documents
    from ..workers.texts.files import build_text

    with _bars() as shown:
        reading = read_documents(sources)
        shown.left_out(reading.skipped)
        documents = [(document.name, document.text) for document in reading.documents]
        told = [str(path) for path in sources]
        made = build_text(out, name=name, documents=documents, sources=told, progress=shown)
    typer.echo(f"{out}: {made.ntotal} passages")


async def _datastore(
    name: str,
    sources: list[Path],
    model: str,
    out: Path,
    max_tokens: int | None,
    broker: str | None,
    how: dict[str, Any],
) -> "Manifest":
    from tokenizers import Tokenizer

    from ..client.client import connect
    from ..workers.datastore.build import build_datastore
    from ..workers.datastore.sources import read_documents
    from ..workers.models import resolve

    called, directory = resolve(model)
    vocabulary = directory / "tokenizer.json"
    if not vocabulary.is_file():
        raise Refused(f"{directory}: holds no tokenizer.json, so no text can be indexed; add the model's own")
    reading = read_documents(sources)
    with _bars() as shown:
        shown.left_out(reading.skipped)
        shown("start the model", 0, 1)
        async with _served(str(directory) if called != model else model, broker) as url, connect(url) as client:
            shown("start the model", 1, 1)
            return await build_datastore(
                client,
                model=called,
                name=name,
                documents=reading.documents,
                tokenizer=Tokenizer.from_file(str(vocabulary)),
                out=out,
                max_tokens=max_tokens,
                sources=[str(path) for path in sources],
                progress=shown,
                **how,
            )


@asynccontextmanager
async def _served(model: str, broker: str | None) -> AsyncIterator[str]:
    """The address of a broker whose cluster serves the model; where none is named, one that lives as long as this."""
    if broker is not None:
        yield broker
        return
    from ..cluster.local import local_cluster

    without_keys()
    async with local_cluster(model=model, stages=1, generator=False, threads=_threads()) as cluster:
        yield cluster.url


@contextmanager
def _bars() -> "Iterator[Bars]":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    try:
        yield Bars(bars)
    finally:
        if bars.live.is_started:
            bars.stop()


class Bars:
    """A progress bar for each stage of a build, made when it is first heard of."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._progress.start()  # not before: what is refused at once leaves a line alone
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def left_out(self, skipped: "Any") -> None:
        """Names the files that were not read."""
        for path in skipped:
            self._progress.console.print(f"left out, not UTF-8 or not readable: {path}", markup=False)
