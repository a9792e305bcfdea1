"""Live indexes as real processes: changes under steady searching, kill -9 during adds, snapshots with a flipped bit."""

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import ralmq
from checks import Line, counted, size
from ralmq.client.client import Client
from ralmq.workers.index.manifest import ManifestError
from ralmq.workers.index.store import open_index
from ralmq.workers.live.opening import create_live, open_live
from ralmq.workers.live.snapshot import found
from serving import broker, free_url, until, worker

D = 64
FACTORIES = ("HNSW16", "IVF16,Flat", "Flat")
ADDS = size(10_000, 400)
KILLS = size(20, 2)
FLIPS = size(1000, 50)
STEADY = size(3000, 200)  # adds under steady searching, a third of which are deleted again
BUILT = 9000  # there before, and merged: a segment of the index's kind
IN_FLIGHT = 32
LONG = 120.0


def vectors(first: int, count: int = 1) -> Any:
    """Each id's own."""
    numbers = range(first, first + count)
    return np.stack([np.random.default_rng(number).normal(size=D) for number in numbers]).astype(np.float32)


@counted
async def live_steady(folder: Path) -> AsyncIterator[Line]:
    """An add is seen by the next search, a deleted id by none."""
    for factory in FACTORIES:
        at, url = folder / factory.replace(",", "-"), free_url()
        create_live(at, name="docs", dimension=D, factory=factory)
        with broker(folder, url), worker(folder, url, "index", index=at):
            async with ralmq.connect(url) as client:
                counts = await _steady(client)
        wrong = counts["late"] + counts["back"]
        said = f"{counts['adds']} adds, {counts['deletes']} deletes, {counts['searches']} searches: {wrong} wrong"
        yield Line(f"{factory}: adds not seen, deleted ids seen, under searches", "0", said, wrong == 0)


async def _steady(client: Client) -> Counter[str]:
    counts: Counter[str] = Counter()
    dead: set[int] = set()
    await client.add("docs", vectors(0, BUILT), np.arange(BUILT), wait_service=LONG, deadline=LONG)

    async def merged() -> bool:
        return not (await client.request("search:docs", {"info": True})).body["unmerged"]

    await until(merged, "the first merge", LONG)
    ended = asyncio.Event()

    async def search() -> None:
        while not ended.is_set():
            gone = frozenset(dead)
            near = random.choice(sorted(gone)[-20:]) if gone else 0
            hits = await client.search("docs", vectors(near), k=50, payloads=False)
            counts["searches"] += 1
            counts["back"] += len(gone & set(hits.ids.ravel().tolist()))

    async def change(lane: int) -> None:
        for number in range(BUILT + lane, BUILT + STEADY, 8):
            await client.add("docs", vectors(number), [number])
            hits = await client.search("docs", vectors(number), k=1, payloads=False)
            counts["adds"] += 1
            counts["late"] += int(hits.ids[0, 0] != number)
            if number % 3 == 0:
                gone = number if number % 2 else number - BUILT  # what has just come, and what has long been merged
                await client.delete("docs", [gone])
                dead.add(gone)
                hits = await client.search("docs", vectors(gone), k=50, payloads=False)
                counts["deletes"] += 1
                counts["back"] += int(gone in hits.ids)

    searches = [asyncio.create_task(search()) for _ in range(2)]
    await asyncio.gather(*(change(lane) for lane in range(8)))
    ended.set()
    await asyncio.gather(*searches)
    return counts


@counted
async def live_kill(folder: Path) -> AsyncIterator[Line]:
    """Acknowledged adds after kill -9; those in hand go on with the next process."""
    at, url = folder / "docs", free_url()
    create_live(at, name="docs", dimension=D, factory="HNSW16")
    acknowledged: set[int] = set()
    lost, retried = 0, 0
    with broker(folder, url):
        async with ralmq.connect(url) as client:
            process = worker(folder, url, "index", index=at).__enter__()
            await client.request("search:docs", {"info": True}, wait_service=LONG, deadline=LONG)
            adding = asyncio.create_task(_adds(client, acknowledged))
            writing = asyncio.create_task(_snapshots(client))
            try:
                for kill in range(KILLS):
                    goal = (kill + random.random()) * ADDS / KILLS
                    await until(lambda goal=goal: len(acknowledged) > goal or adding.done(), "adds", LONG)
                    process.send(signal.SIGKILL)
                    before = sorted(acknowledged)
                    process.__exit__()
                    process = worker(folder, url, "index", index=at).__enter__()
                    lost += await _missing(client, before)
                retried = await adding
                lost += await _missing(client, sorted(acknowledged))
                info = (await client.request("search:docs", {"info": True})).body
            finally:
                adding.cancel()
                writing.cancel()
                process.__exit__()
    said = f"{len(acknowledged)} acknowledged, {KILLS} kills, {retried} sent again by hand: {lost} missing"
    yield Line("acknowledged adds that are not there after kill -9", "0", said, lost == 0)
    twice = info["ntotal"] - ADDS
    yield Line("entries more or fewer than adds, after all were acknowledged", "0", str(twice), twice == 0)


async def _adds(client: Client, acknowledged: set[int]) -> int:
    """All adds, a few at a time; how many of them ended with an error and were sent again."""
    turn = asyncio.Semaphore(IN_FLIGHT)
    again = 0

    async def one(number: int) -> None:
        nonlocal again
        async with turn:
            upsert = False  # what the broker gives to the next process is done once; what is sent again may be twice
            while True:
                try:
                    await client.add("docs", vectors(number), [number], upsert=upsert, deadline=LONG, wait_service=LONG)
                    break
                except ralmq.errors.WorkerLost:
                    again, upsert = again + 1, True
            acknowledged.add(number)

    await asyncio.gather(*(one(number) for number in range(ADDS)))
    return again


async def _snapshots(client: Client) -> None:
    """One after the other, so that some are cut off by a kill."""
    while True:
        await asyncio.sleep(0.3)
        with contextlib.suppress(ralmq.errors.RalmqError):
            await client.snapshot("docs", wait_service=LONG)


async def _missing(client: Client, ids: list[int]) -> int:
    missing = 0
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        body = {"k": 1, "exact": True}
        queries = np.concatenate([vectors(number) for number in some])
        reply = await client.request("search:docs", body, tensors=[queries], deadline=LONG, wait_service=LONG)
        nearest, distances = (tensor.numpy()[:, 0] for tensor in reply.tensors)
        missing += int(np.count_nonzero((nearest != np.array(some)) | (distances > 1e-4)))
    return missing


@counted
async def live_flips(folder: Path) -> AsyncIterator[Line]:
    """One flipped bit of a snapshot, anywhere."""
    create_live(folder / "docs", name="docs", dimension=D, factory="HNSW16")
    index = open_live(folder / "docs")
    index.add(vectors(0, 300), fields=[{"n": number, "text": f"entry {number}"} for number in range(300)])
    index.snapshot()
    index.close()
    ((_, path),) = found(folder / "docs")
    read, calls, accepted = faiss.read_index, 0, 0

    def counted_read(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return read(*given)

    faiss.read_index = counted_read
    try:
        files = sorted(path.iterdir())
        ends = np.cumsum([file.stat().st_size for file in files])
        for turn in range(FLIPS):
            # half of the places are spread over the bytes, half over the files, however small
            byte = random.randrange(int(ends[-1]))
            file = files[int(np.searchsorted(ends, byte, side="right"))] if turn % 2 else files[turn % len(files)]
            raw = bytearray(file.read_bytes())
            whole = bytes(raw)
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
            file.write_bytes(raw)
            try:
                open_index(path)
                accepted += 1
            except ManifestError:
                pass
            file.write_bytes(whole)
        refused = calls
        open_index(path)
    finally:
        faiss.read_index = read
    said = f"{FLIPS} flips in {len(files)} files: {accepted} accepted, faiss read {refused} times"
    yield Line("snapshots with a flipped bit that are accepted, or that faiss reads", "0", said, not accepted + refused)
    yield Line("the same without a flip: faiss reads", "1", str(calls - refused), calls - refused == 1)
