"""Retrieval hidden behind generation: W sequences whose decoding and searches sleep, against one at a time."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ralmq
from check_schedule import prompts, rate
from checkpoints import VOCAB, tiny
from checks import Line, check
from ralmq.client.client import Client
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.writer import write_index
from serving import broker, free_url, until, worker
from stage.pipelines import MODEL, lm

HERE = Path(__file__).parent
DECODE, SEARCH = 20.0, 20.0  # ms of a token in all stages together, and of a retrieval
TOKENS = 60


@dataclass(frozen=True, slots=True)
class Ran:
    """Tokens of each sequence, and when they came."""

    tokens: list[list[int]]
    came: list[list[float]]


@asynccontextmanager
async def pipeline(folder: Path, path: Path, count: int, rows: bool, jitter: float = 0.0) -> AsyncIterator[Client]:
    """A client of `count` stages that share the time of a token, and of an index of random vectors."""
    url = free_url()
    shutil.copy(HERE / "sleepy_retrieval.py", folder)
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for place in range(count):
            options = {"model": path, "stage": f"{place}/{count}", "name": MODEL, "ms": DECODE / count, "rows": rows}
            stack.enter_context(worker(folder, url, "sleepy_retrieval:Steps", **options))
        async with ralmq.connect(url, wait=30) as client:
            first = [np.array([5, 6], np.int32)]
            reply = await client.request(f"lm:{MODEL}", {"mode": "score"}, tensors=first, wait_service=60)
            index(folder / "docs", reply.body)
            options = {"index": folder / "docs", "ms": SEARCH, "jitter": jitter}
            stack.enter_context(worker(folder, url, "sleepy_retrieval:Searches", **options))

            async def there() -> bool:
                return "search:docs" in (await client.status())["services"]

            await until(there, "search:docs", 90)
            yield client


def index(out: Path, info: dict[str, Any]) -> None:
    random = np.random.default_rng(5)
    stream = TokenStream(random.integers(3, VOCAB, 2000).astype(np.int32), ("a",), np.zeros(1, np.int64))
    entries = stream.entries()
    vectors = random.normal(size=(len(entries), info["d"])).astype(np.float32)
    about = {"name": "docs", "model": MODEL, "fingerprint": info["fingerprint"]}
    write_index(out, vectors=vectors, stream=stream, entries=entries, **about)


async def together(client: Client, asked: Sequence[Sequence[int]], staleness: int = 0) -> Ran:
    retrieve = {"index": "docs", "k": 8, "knn_lambda": 0.5, "knn_temperature": 100.0, "staleness": staleness}
    loop = asyncio.get_running_loop()

    async def one(prompt: Sequence[int]) -> list[tuple[int, float]]:
        stream = lm(client, prompt, max_tokens=TOKENS, ignore_eos=True, retrieve=retrieve)
        return [(part.body["token"], loop.time()) async for part in stream]

    found = await asyncio.gather(*[one(prompt) for prompt in asked])
    return Ran([[token for token, _ in one] for one in found], [[at for _, at in one] for one in found])


async def alone(client: Client, asked: Sequence[Sequence[int]]) -> Ran:
    """One after the other."""
    every = [await together(client, [prompt]) for prompt in asked]
    return Ran([one.tokens[0] for one in every], [one.came[0] for one in every])


def gain(ran: Ran, serial: Ran) -> float:
    """How many times the tokens/s of one sequence alone."""
    return rate(ran.came) / float(np.mean([rate([one]) for one in serial.came]))


def same(ran: Ran, serial: Ran) -> tuple[str, bool]:
    equal = sum(a == b for a, b in zip(ran.tokens, serial.tokens, strict=False))
    return f"{equal} of {len(ran.tokens)}", equal == len(ran.tokens)


@check
async def retrieval_hidden(folder: Path) -> AsyncIterator[Line]:
    """In one kind of pipeline a STEP takes its time whatever it holds, in the other each row does."""
    path = tiny("llama", folder / "llama")
    for rows in (False, True):
        kind = "each row sleeps" if rows else "each STEP sleeps"
        where = folder / f"one-{rows}"
        where.mkdir()
        async with pipeline(where, path, 1, rows) as client:
            asked = prompts(2, 4)
            serial = await alone(client, asked)
            two = await together(client, asked)
            found = gain(two, serial)
            yield Line(f"{kind}: 2 sequences, times the tokens/s of one", ">= 1.8", f"{found:.2f}", found >= 1.8)
            shown, good = same(two, serial)
            yield Line(f"{kind}: 2 sequences with the tokens of each alone", "all", shown, good)
            stale = await together(client, asked[:1], staleness=1)
            found = gain(stale, serial)
            what = f"{kind}: 1 sequence with staleness 1, times the tokens/s without"
            yield Line(what, ">= 1.8", f"{found:.2f}", found >= 1.8)
        for stages, count, jitter, what, bound in (
            (1, 3, 0.5, "3 sequences, searches of 10 to 30 ms", 1.9),
            (3, 6, 0.0, "6 sequences on 3 stages", 5.2),
        ):
            where = folder / f"{count}-{rows}"
            where.mkdir()
            async with pipeline(where, path, stages, rows, jitter=jitter) as client:
                asked = prompts(count, 4)
                serial = await alone(client, asked)
                ran = await together(client, asked)
            found = gain(ran, serial)
            yield Line(f"{kind}: {what}, times the tokens/s of one", f">= {bound}", f"{found:.2f}", found >= bound)
            shown, good = same(ran, serial)
            yield Line(f"{kind}: {count} sequences with the tokens of each alone", "all", shown, good)
