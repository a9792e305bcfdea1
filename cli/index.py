"""`ralmq index build`: texts in, an index directory out, with a progress bar. Knows what to start, no index."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ..schema.errors import Refused
from .shared import Keys, run, show_help, without_keys

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..workers.index.manifest import Manifest

index = typer.Typer(help="Indexes of your own texts.", invoke_without_command=True, rich_markup_mode=None)
MAX_THREADS: Final = 4  # of the stage that a build starts; a small model gains nothing from more


@index.callback()
def _group(context: typer.Context) -> None:
    """Indexes of your own texts."""
    show_help(context)


@index.command()
def build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the index is called when it is served.")],
    source: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help=".txt .md .rst .py files, or folders.")],
    model: Annotated[str, typer.Option("--model", help="The model whose states are indexed: a directory, or demo.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the index is written.")],
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Index so many tokens at most.")] = None,
    broker: Annotated[
        str | None,
        typer.Option("--broker", metavar="URL", help="A cluster that serves the model; else one is started."),
    ] = None,
    keys: Keys = None,
) -> None:
    """Build an index of a model's hidden states over texts."""
    manifest = run(_build(name, source, model, out.expanduser(), max_tokens, broker))
    typer.echo(f"{out}: {manifest.ntotal} entries of {manifest.dimension} dimensions ({manifest.factory})")
    typer.echo(f"serve it with `ralmq up --index {out}` or `ralmq worker index -o index={out}`")


async def _build(
    name: str, sources: list[Path], model: str, out: Path, max_tokens: int | None, broker: str | None
) -> "Manifest":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from tokenizers import Tokenizer

    from ..client.client import connect
    from ..workers.datastore.build import build_datastore
    from ..workers.datastore.sources import read_documents
    from ..workers.models import resolve

    called, directory = resolve(model)
    vocabulary = directory / "tokenizer.json"
    if not vocabulary.is_file():
        raise Refused(f"{directory}: holds no tokenizer.json, so no text can be indexed; add the model's own")
    reading = read_documents([path.expanduser() for path in sources])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        for skipped in reading.skipped:
            bars.console.print(f"left out, not UTF-8 or not readable: {skipped}", markup=False)
        shown = Bars(bars)
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
            )


@asynccontextmanager
async def _served(model: str, broker: str | None) -> AsyncIterator[str]:
    """The address of a broker whose cluster serves the model; where none is named, one that lives as long as this."""
    if broker is not None:
        yield broker
        return
    from ..cluster.local import local_cluster

    without_keys()
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    async with local_cluster(model=model, stages=1, generator=False, threads=threads) as cluster:
        yield cluster.url


class Bars:
    """A progress bar for each stage of a build, made when it is first heard of."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)
