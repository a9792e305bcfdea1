"""Shards and replicas as real processes: the same answers as one faiss index, one lost, one late, and filters."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ralmq
from checks import Line, counted, size
from ralmq.client.client import Client
from ralmq.errors import RalmqError
from ralmq.workers.index.quantizer import Quantizer
from ralmq.workers.index.writer import write_vectors
from serving import broker, free_url, until, worker

D, LISTS = 32, 32
COUNT = size(6000, 2000)
QUERIES = 16
FACTORIES = ("IVF32,Flat", "IVF32,SQ8", "IVF32,PQ8")
KILLS = size(10, 2)
LATE = 0.05

Array = np.ndarray[Any, Any]


def vectors(count: int, seed: int) -> Array:
    """Clusters, as real ones are; small whole numbers in part, so that some distances are equal."""
    chance = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(64, D)) * 3
    found = centres[chance.integers(0, 64, count)] + chance.normal(size=(count, D))
    found[: count // 8] = np.round(found[: count // 8])
    return found.astype(np.float32)


class Served:
    """An index in shards, each by so many servers; `processes` are those."""

    def __init__(self, stack: ExitStack, folder: Path, shards: int, replicas: int = 1, **how: Any) -> None:
        self.at, self.shards, self.url = folder / "index", shards, free_url()
        write_vectors(self.at, name="docs", vectors=vectors(COUNT, 0), shards=shards, **how)
        stack.enter_context(broker(folder, self.url))
        self.processes = [
            stack.enter_context(worker(folder, self.url, "index", index=self.at, **self._shard(shard)))
            for shard in range(shards)
            for _ in range(replicas)
        ]

    def _shard(self, shard: int) -> dict[str, str]:
        return {"shard": f"{shard}/{self.shards}"} if self.shards > 1 else {}

    async def ready(self, client: Client) -> None:
        async def all_there() -> bool:
            return len((await client.status())["workers"]) == len(self.processes)

        await until(all_there, "the index servers")


def whole(factory: str, queries: Array, k: int, nprobe: int, at: Path) -> tuple[Array, Array]:
    """What faiss itself finds in the whole index, with more than k of each row, for ties at its end."""
    index = faiss.read_index(str(at / "index.faiss"))
    index.nprobe = nprobe
    distances, ids = index.search(queries, k)
    return ids, distances


def differ(hits: Any, ids: Array, distances: Array) -> int:
    """Rows whose distances are not those of faiss, whose unique ones have other ids, or whose ties are out of order."""
    wrong = 0
    for row in range(len(ids)):
        known = ids[row] >= 0
        same = np.array_equal(hits.distances[row][known], distances[row][known]) and np.array_equal(
            hits.ids[row] >= 0, known
        )
        values, counts = np.unique(distances[row][known], return_counts=True)
        lone = np.isin(distances[row], values[counts == 1]) & known
        last = distances[row][known].max(initial=-np.inf)  # one more of the same may stand behind the k-th
        lone &= distances[row] < last
        tied = all(np.all(np.diff(hits.ids[row][hits.distances[row] == v]) > 0) for v in values[counts > 1])
        wrong += not (same and tied and np.array_equal(hits.ids[row][lone], ids[row][lone]))
    return wrong


@counted
async def shards_as_one(folder: Path) -> AsyncIterator[Line]:
    """1, 2 and 4 shards, both layouts, with and without lists chosen by the asker."""
    asked = vectors(QUERIES, 9)
    for factory in FACTORIES:
        rows = wrong = 0
        reference = folder / factory.replace(",", "-")
        write_vectors(reference, name="docs", vectors=vectors(COUNT, 0), factory=factory)
        for shards, by in ((1, "rows"), (2, "rows"), (2, "list"), (4, "rows"), (4, "list")):
            at = folder / f"{factory.replace(',', '-')}-{shards}-{by}"
            at.mkdir()
            with ExitStack() as stack:
                served = Served(stack, at, shards, factory=factory, by=by)
                async with ralmq.connect(served.url, wait=30) as client:
                    await served.ready(client)
                    chooser = await quantizer(client)
                    for k, nprobe in product((1, 10, 100), (1, 8, 32)):
                        expected = whole(factory, asked, k, nprobe, reference)
                        plain = await client.search("docs", asked, k=k, nprobe=nprobe, payloads=False)
                        lists = chooser.assign(asked, nprobe)
                        chosen = await client.search("docs", asked, k=k, lists=lists, payloads=False)
                        for hits in (plain, chosen):
                            rows += QUERIES
                            wrong += differ(hits, *expected)
                        same = np.array_equal(plain.ids, chosen.ids) and np.array_equal(
                            plain.distances, chosen.distances
                        )
                        wrong += not same
        what = f"{factory}: rows that differ from faiss on the whole index (1, 2, 4 shards; rows, lists)"
        yield Line(what, f"0 of {rows}", f"{wrong}", wrong == 0)


async def quantizer(client: Client) -> Quantizer:
    reply = await client.request("search:docs", {"quantizer": True})
    return Quantizer(reply.tensors[0].numpy(), reply.body["metric"])


@counted
async def replica_killed(folder: Path) -> AsyncIterator[Line]:
    """Two servers a shard; one of them is killed under load, started again, and so on."""
    with ExitStack() as stack:
        served = Served(stack, folder, 2, replicas=2, factory="IVF32,Flat")
        async with ralmq.connect(served.url, wait=30) as client:
            await served.ready(client)
            asked = vectors(QUERIES, 9)
            wanted = await client.search("docs", asked, k=10, payloads=False)
            done, failed, over = 0, [], asyncio.Event()

            async def load() -> None:
                nonlocal done
                while not over.is_set():
                    try:
                        hits = await client.search("docs", asked, k=10, payloads=False)
                        done += 1
                        if not np.array_equal(hits.ids, wanted.ids):
                            failed.append("other ids")
                    except RalmqError as error:
                        failed.append(str(error))

            loads = [asyncio.create_task(load()) for _ in range(8)]
            for number in range(KILLS):
                await asyncio.sleep(0.3)
                process = served.processes[number % 4]
                process.send(signal.SIGKILL)
                process.__exit__(None, None, None)
                served.processes[number % 4] = stack.enter_context(
                    worker(folder, served.url, "index", index=served.at, shard=f"{number % 4 // 2}/2")
                )
                await served.ready(client)
            over.set()
            await asyncio.gather(*loads)
    what = f"{KILLS} kills of a replica under load: searches that failed"
    yield Line(what, "0", f"{len(failed)} of {done} {failed[:1]}", not failed and done > 0)


@counted
async def shard_stopped(folder: Path) -> AsyncIterator[Line]:
    """One of four shards stands still; those who take a partial answer have it by their deadline."""
    asked = vectors(QUERIES, 9)
    for by in ("rows", "list"):
        at = folder / by
        at.mkdir()
        with ExitStack() as stack:
            served = Served(stack, at, 4, factory="IVF32,Flat", by=by)
            async with ralmq.connect(served.url, wait=30) as client:
                await served.ready(client)
                await client.search("docs", asked, k=10, nprobe=LISTS, payloads=False)
                pid = served.processes[2].pid
                os.kill(pid, signal.SIGSTOP)
                try:
                    begun = time.monotonic()
                    hits = await client.search(
                        "docs", asked, k=10, nprobe=LISTS, payloads=False, partial=True, deadline=LATE
                    )
                    took = time.monotonic() - begun
                finally:
                    os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.2)
                parts = []
                for shard in (0, 1, 3):
                    body = {"k": 10, "nprobe": LISTS}
                    parts.append((await client.request(f"search:docs/{shard}", body, tensors=[asked])).tensors)
        ids = np.concatenate([part[0].numpy() for part in parts], 1)
        distances = np.concatenate([part[1].numpy() for part in parts], 1)
        order = np.lexsort((ids, distances), axis=1)[:, :10]
        same = np.array_equal(hits.ids, np.take_along_axis(ids, order, 1))
        good = hits.coverage == 0.75 and same and took <= LATE
        said = f"coverage {hits.coverage}, {'equal' if same else 'other ids'}, {took * 1000:.0f} ms"
        yield Line(f"by {by}: one of 4 shards stopped, 50 ms, partial", "0.75, equal, <= 50 ms", said, good)


@counted
async def filter_of_one_percent(folder: Path) -> AsyncIterator[Line]:
    """Against brute force over what the filter keeps."""
    asked = vectors(QUERIES, 9)
    kept = np.arange(0, COUNT, 100)
    fields = [json.dumps({"group": number % 100}) for number in range(COUNT)]
    distances = ((asked[:, None] - vectors(COUNT, 0)[kept][None]) ** 2).sum(-1)
    wanted = kept[np.argsort(distances, 1, kind="stable")[:, :10]]
    for factory in ("Flat", "IVF32,Flat"):
        at = folder / factory.replace(",", "-")
        at.mkdir()
        with ExitStack() as stack:
            served = Served(stack, at, 2, factory=factory, fields=fields)
            async with ralmq.connect(served.url, wait=30) as client:
                await served.ready(client)
                nprobe = {} if factory == "Flat" else {"nprobe": LISTS}
                hits = await client.search("docs", asked, k=10, filter={"group": 0}, **nprobe)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(hits.ids.tolist(), wanted.tolist(), strict=True)])
        other = sum(line.get("group") != 0 for row in hits.payloads for line in row)
        said = f"recall@10 {recall:.3f}, {other} others"
        yield Line(f"{factory}: a filter that keeps 1 %", "1.0, 0 others", said, recall == 1.0 and not other)
