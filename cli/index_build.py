"""What `ralmq index build` runs: sources read, services asked or started, bars shown. Knows no index and no model."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from ..schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ..schema.errors import Refused
from .shared import check_broker, without_keys

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..workers.index.manifest import Manifest

MAX_THREADS: Final = 4  # of the model that a build starts; a small one gains nothing from more


def threads() -> int:
    """That a build uses."""
    return min(MAX_THREADS, os.cpu_count() or 1)


def check_free(out: Path) -> None:
    """Refuses to write over an index that nobody asked to replace."""
    if any((place / "manifest.json").exists() for place in (out, out / "shard-0")):
        raise Refused(f"{out}: holds an index already; add --replace to build anew over it, or choose another --out")


def check(name: str, out: Path, how: dict[str, Any]) -> None:
    """Refuses what cannot be built wherever the vectors come from, before they are made."""
    from ..workers.index.writer import Build, check_build

    check_build(out, name, Build(**how))


def vectors(name: str, source: Path, out: Path, fields: Path | None, encoder: str, how: dict[str, Any]) -> "Manifest":
    """Of a .npy file; `encoder` is the name, or the directory, of what made them."""
    from ..workers.index.vectors import read_fields, read_vectors
    from ..workers.index.writer import write_vectors

    with _bars() as shown:
        return write_vectors(
            out,
            name=name,
            vectors=read_vectors(source),
            fields=None if fields is None else read_fields(fields.expanduser()),
            encoder=named(encoder)[0] if encoder else "",
            sources=[str(source)],
            progress=shown,
            **how,
        )


def words(name: str, sources: list[Path], out: Path) -> None:
    """Of the words of texts."""
    from ..workers.datastore.sources import read_documents
    from ..workers.texts.files import build_text

    with _bars() as shown:
        reading = read_documents(sources)
        shown.left_out(reading.skipped)
        documents = [(document.name, document.text) for document in reading.documents]
        told = [str(path) for path in sources]
        made = build_text(out, name=name, documents=documents, sources=told, progress=shown)
    typer.echo(f"{out}: {made.ntotal} passages")


async def datastore(
    name: str,
    sources: list[Path],
    model: str,
    out: Path,
    max_tokens: int | None,
    broker: str | None,
    how: dict[str, Any],
) -> "Manifest":
    """Of a model's hidden states over texts, by a model that is served, or started from its directory."""
    from tokenizers import Tokenizer

    from ..client.client import connect
    from ..workers.datastore.build import build_datastore
    from ..workers.datastore.sources import read_documents
    from ..workers.engine.config import is_encoder, read_json
    from ..workers.models import resolve

    called, directory = resolve(model)
    if is_encoder(read_json(directory / "config.json")):
        raise Refused(f"{directory}: is an encoder, no language model; give it as --encoder {model}")
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


async def encoded(
    name: str, sources: list[Path], encoder: str, out: Path, broker: str | None, how: dict[str, Any]
) -> "Manifest":
    """Of the passages of texts, their vectors made by an encoder that is served, or started from its directory."""
    from ..client.client import connect
    from ..workers.datastore.encoded import build_encoded, embedded, passage_fields
    from ..workers.datastore.sources import read_documents
    from ..workers.index.writer import Build, check_build

    called, directory = named(encoder)
    reading = read_documents(sources)
    found = passage_fields(reading.documents)
    check_build(out, name, Build(**how), total=len(found))
    with _bars() as shown:
        shown.left_out(reading.skipped)
        shown("reach the encoder", 0, 1)
        async with _encoder(directory, broker) as url, connect(url) as client:
            shown("reach the encoder", 1, 1)
            width = (await embedded(client, called, [found[0]["text"]])).shape[1]
            check_build(out, name, Build(**how), total=len(found), width=width)
            return await build_encoded(
                client,
                encoder=called,
                name=name,
                documents=reading.documents,
                out=out,
                sources=[str(path) for path in sources],
                progress=shown,
                **how,
            )


def named(encoder: str) -> tuple[str, Path | None]:
    """The name of an encoder, and its directory where it is one and not a name alone.

    Raises:
        Refused: a path that holds no model, or a name that no encoder can have.
    """
    from ..workers.index.manifest import valid_name
    from ..workers.models import resolve

    directory = None
    called = encoder
    if "/" in encoder or (Path(encoder) / "config.json").is_file():
        called, directory = resolve(encoder)
    if not valid_name(called):
        raise Refused(
            f"--encoder {encoder}: a name is 1 to 64 letters, digits, '.', '_' or '-'; rename the directory, or give "
            "the NAME of an encoder that is served as embed:NAME"
        )
    return called, directory


@asynccontextmanager
async def _encoder(directory: Path | None, broker: str | None) -> AsyncIterator[str]:
    """The address of a broker where the encoder is served; a directory is served for as long as this lives."""
    if broker is not None or directory is None:
        yield broker or check_broker(os.environ.get(BROKER_VARIABLE) or None) or DEFAULT_BROKER
        return
    from ..cluster.local import local_cluster

    without_keys()
    worker = ("encoder", "-o", f"model={directory}", "-o", f"threads={threads()}")
    async with local_cluster(stages=0, generator=False, extra=[worker]) as cluster:
        yield cluster.url


@asynccontextmanager
async def _served(model: str, broker: str | None) -> AsyncIterator[str]:
    """The address of a broker whose cluster serves the model; where none is named, one that lives as long as this."""
    if broker is not None:
        yield broker
        return
    from ..cluster.local import local_cluster

    without_keys()
    async with local_cluster(model=model, stages=1, generator=False, threads=threads()) as cluster:
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
