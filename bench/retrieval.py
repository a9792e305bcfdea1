"""What retrieval in the loop costs a generation, by interval and staleness. Knows the client's API.

The index answers from random unit vectors: how fast it answers is measured here, not what it is good for.
"""

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..client.client import Client, connect
from ..cluster.local import local_cluster
from ..workers.datastore.score import describe
from ..workers.index.stream import TokenStream
from ..workers.index.writer import write_index
from . import search
from .command import run
from .pipeline import generated
from .search import Searches

ENTRIES = 50_000
SEQUENCES = 4
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("each token", {"retrieve": "bench", "interval": 1}),
    ("each token, staleness 1", {"retrieve": "bench", "interval": 1, "staleness": 1}),
    ("each 4 tokens", {"retrieve": "bench", "interval": 4}),
    ("each 8 tokens", {"retrieve": "bench", "interval": 8}),
)


@dataclass
class Row:
    """Medians of one way to retrieve; `ratio` is to no retrieval within the same round."""

    retrieval: str
    tokens_per_s: float
    ratio: float


async def build(client: Client, model: str, path: Path) -> None:
    """An index of random vectors that claims this model."""
    info = await describe(client, model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, info.vocab, ENTRIES + 1).astype(np.int32)
    vectors = rng.standard_normal((ENTRIES, info.d), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stream = TokenStream(tokens, ("random",), np.zeros(1, np.int64))
    await asyncio.to_thread(
        write_index,
        path,
        name="bench",
        vectors=vectors,
        stream=stream,
        entries=stream.entries(),
        model=model,
        fingerprint=info.fingerprint,
    )


async def bench(model: str = "demo", *, quick: bool = False) -> list[Row | Searches]:
    """Measures; some minutes, quick half a minute.

    Raises:
        RalmqError: the cluster did not come up, or a generation failed.
    """
    rounds, tokens = (3, 32) if quick else (7, 64)
    rates: dict[str, list[float]] = {name: [] for name, _ in CASES}
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ralmq-bench-")))
        cluster = await stack.enter_async_context(local_cluster(model=model))
        client = await stack.enter_async_context(connect(cluster.url))
        await build(client, model, directory / "bench")
        await cluster.spawn("index", "-o", f"index={directory / 'bench'}")
        await cluster.ready()
        for _, options in CASES:
            await generated(client, model, SEQUENCES, 8, **options)
        for _ in range(rounds):
            for name, options in CASES:
                rates[name].append(await generated(client, model, SEQUENCES, tokens, **options))
    with tempfile.TemporaryDirectory(prefix="ralmq-bench-") as folder:
        searches = await search.bench(Path(folder), quick=quick)
    plain = rates[CASES[0][0]]
    generations = [
        Row(name, statistics.median(taken), statistics.median([a / b for a, b in zip(taken, plain, strict=True)]))
        for name, taken in rates.items()
    ]
    return [*generations, *searches]


def show(rows: Sequence[Row | Searches], console: Console) -> None:
    """Prints the tables."""
    title = f"generation with kNN retrieval: 2 stages, {SEQUENCES} sequences, {ENTRIES:,} entries, k = 8"
    table = Table(title=title, title_justify="left")
    table.add_column("retrieval")
    for heading in ("tokens/s", "of none's"):
        table.add_column(heading, justify="right")
    searches = Table(title="searches of one vector, 256 at a time, nprobe 8, 1 thread", title_justify="left")
    searches.add_column("searches")
    for heading in ("a second", "of faiss's"):
        searches.add_column(heading, justify="right")
    for row in rows:
        if isinstance(row, Row):
            table.add_row(row.retrieval, f"{row.tokens_per_s:,.0f}", f"{row.ratio:.2f}")
        else:
            searches.add_row(row.searches, f"{row.per_s:,.0f}", f"{row.ratio:.2f}")
    console.print(table)
    console.print(searches)


def main(arguments: Sequence[str] | None = None) -> int:
    """See command.run."""
    return run("retrieval", bench, show, arguments)


if __name__ == "__main__":
    sys.exit(main())
