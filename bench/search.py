"""What batching gives an index server, beside faiss in this process. Knows the client's API and write_vectors."""

import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ..client.client import Client, connect
from ..cluster.local import local_cluster
from ..workers.index.manifest import VECTORS
from ..workers.index.writer import write_vectors

Array = np.ndarray[Any, Any]
D, K, NPROBE, AT_ONCE = 256, 10, 8, 256
FREEDOM, NOISE, PART = 64, 0.1, 4096  # of the made-up vectors: dimensions, noise on all, rows made at once


@dataclass
class Searches:
    """Medians of one way to search; `ratio` is to faiss within the same round."""

    searches: str
    per_s: float
    ratio: float


async def bench(directory: Path, *, quick: bool = False) -> list[Searches]:
    """Single-vector searches, 256 at a time: faiss in this process, a server with batches, and one without.

    Raises:
        RalmqError: the cluster did not come up, or a search failed.
    """
    count, lists, rounds, asked = (50_000, 256, 3, 1024) if quick else (400_000, 1024, 5, 2048)
    vectors, queries = _made(count, asked)
    path = directory / "searched"
    factory = f"IVF{lists},Flat"
    await asyncio.to_thread(write_vectors, path, name="searched", vectors=vectors, factory=factory, threads=2)
    del vectors
    index = faiss.read_index(str(path / VECTORS))
    servers = [
        ["index", "-o", f"index={path}", "-o", "recall=0", "-o", f"name={name}", "-o", f"batch={batch}"]
        for name, batch in (("many", AT_ONCE), ("one", 1))
    ]
    rates: dict[str, list[float]] = {"faiss, batches of 256": [], "server, batches": [], "server, batch 1": []}
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(local_cluster(stages=0, generator=False, extra=servers))
        client = await stack.enter_async_context(connect(cluster.url))
        for place in range(rounds + 1):
            found = [
                await asyncio.to_thread(_timed, lambda: _inside(index, queries), asked),
                await _asked(client, "many", queries),
                await _asked(client, "one", queries[: asked // 2]),
            ]
            if place:  # the first round warms up
                for taken, rate in zip(rates.values(), found, strict=True):
                    taken.append(rate)
    plain = next(iter(rates.values()))
    return [
        Searches(name, statistics.median(taken), statistics.median(a / b for a, b in zip(taken, plain, strict=True)))
        for name, taken in rates.items()
    ]


def _made(count: int, asked: int) -> tuple[Array, Array]:
    """Vectors of few degrees of freedom, as those of encoders are: faiss's imbalance factor of their lists is 1.15."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((FREEDOM, D), np.float32) / np.float32(np.sqrt(FREEDOM))
    both = np.empty((count + asked, D), np.float32)
    for start in range(0, len(both), PART):
        part = both[start : start + PART]
        np.matmul(rng.standard_normal((len(part), FREEDOM), np.float32), spread, out=part)
        part += np.float32(NOISE) * rng.standard_normal(part.shape, np.float32)
    return both[:count], both[count:]


def _inside(index: Any, queries: Array) -> None:
    faiss.omp_set_num_threads(1)
    how: Any = faiss.SearchParametersIVF
    for start in range(0, len(queries), AT_ONCE):
        index.search(queries[start : start + AT_ONCE], K, params=how(nprobe=NPROBE))


def _timed(work: Callable[[], None], count: int) -> float:
    begun = time.perf_counter()
    work()
    return count / (time.perf_counter() - begun)


async def _asked(client: Client, name: str, queries: Array) -> float:
    rows = iter(range(len(queries)))
    body = {"k": K, "nprobe": NPROBE}

    async def one() -> None:
        for row in rows:
            await client.request(f"search:{name}", body, tensors=[queries[row : row + 1]])

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return len(queries) / (time.perf_counter() - begun)
