"""Too much is asked, or too little read, of workers that sleep: others are served as without it, and nobody is lost."""

import asyncio
import json
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ralmq
from check_loss import rate_alone
from checkpoints import CONTEXT, tiny
from checks import QUICK, Line, counted, size
from ralmq.client.client import Client
from ralmq.client.pending import WINDOW
from ralmq.errors import Busy, DeadlineExceeded, RalmqError
from serving import broker, free_url, until, worker
from stage.pipelines import MODEL

HERE = Path(__file__).parent
FAST, EVERY = 31, 1.0  # others; seconds between two tokens of the slow reader
WORKERS, SLEEP = 4, 0.1


# -- a slow reader


async def slow_reader(client: Client, tokens: int, read: list[float]) -> None:
    """Takes one token a second; `read` gets when."""
    generation = client.generate([9, 8], model=MODEL, max_tokens=CONTEXT - 20, ignore_eos=True)
    async for _ in generation:
        read.append(time.monotonic())
        if len(read) == tokens:
            break
        await asyncio.sleep(EVERY)
    await generation.aclose()


async def fast_reader(client: Client, number: int, tokens: int) -> int:
    stream = client.generate([5, 6, 7 + number], model=MODEL, max_tokens=tokens, ignore_eos=True)
    return len([token async for token in stream])


async def sleeping(folder: Path, path: Path, tokens: int, reads: int) -> tuple[list[dict[str, Any]], list[float], int]:
    """31 readers of two sleeping stages, beside a slow one where `reads` is above 0: the STEPs, when the slow one took
    its tokens, and how many the others had."""
    folder.mkdir()
    for module in ("sleepy_stage.py", "faulty_workers.py"):
        shutil.copy(HERE / module, folder)
    url, read = free_url(), []
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for place in range(2):
            options = {"model": path, "stage": f"{place}/2", "name": MODEL}
            stack.enter_context(worker(folder, url, "faulty_workers:Recording", **options))
        stack.enter_context(worker(folder, url, "generator", model=path, name=MODEL))
        async with ralmq.connect(url, wait=30) as client, ralmq.connect(url, wait=30) as other:
            first = {"max_tokens": 1}
            await client.request(f"lm:{MODEL}", first, tensors=[np.array([5], np.int32)], wait_service=60)
            await client.request(f"generate:{MODEL}", first, tensors=[np.array([5], np.int32)], wait_service=60)
            slow = asyncio.create_task(slow_reader(other, reads, read)) if reads else None
            had = await asyncio.gather(*[fast_reader(client, n, tokens) for n in range(FAST)])
            if slow is not None:
                await slow
    return [json.loads(line) for line in (folder / "steps").read_text().splitlines()], read, sum(had)


def steps_of(steps: list[dict[str, Any]], tokens: int) -> tuple[list[int], int]:
    """STEPs of each of the fast ones, which differ from others by their limit; and those that held any of them."""
    fast = {identity for step in steps for identity, limit in step["limits"].items() if limit == tokens}
    each = Counter(row for step in steps for row in step["rows"] if row in fast)
    return sorted(each.values()), sum(bool(fast & set(step["rows"])) for step in steps)


def furthest(steps: list[dict[str, Any]], read: list[float]) -> int:
    """Most tokens that the pipeline had made of the slow one and that its reader had not taken."""
    (slow,) = {row for step in steps for row, limit in step["limits"].items() if limit == CONTEXT - 20}
    made = [step["at"] for step in steps if slow in step["made"]]
    return max(number + 1 - bisect_right(read, at) for number, at in enumerate(made))


@counted
async def slow_reader_among_fast_ones(folder: Path) -> AsyncIterator[Line]:
    tokens, reads = size(200, 100), size(70, 8)
    path = tiny("llama", folder / "llama")
    alone, _, _ = await sleeping(folder / "alone", path, tokens, 0)
    beside, read, had = await sleeping(folder / "beside", path, tokens, reads)
    ahead = furthest(beside, read)
    yield Line(
        f"a reader of 1 token/s among {FAST} fast ones: furthest that the pipeline was ahead of it, in tokens",
        f"<= {WINDOW}, its window",
        f"{ahead}, {len(read)} tokens read",
        ahead <= WINDOW and len(read) == reads,
    )
    (each, all_of_them), (each_beside, all_beside) = steps_of(alone, tokens), steps_of(beside, tokens)
    yield Line(
        f"STEPs of each of the {FAST} others, without it and beside it; STEPs with any of them",
        "equal, and all their tokens; within 5 %",
        f"{each[0]} to {each[-1]}, {each_beside[0]} to {each_beside[-1]}, {had} tokens; {all_of_them}, {all_beside}",
        each == each_beside
        and len(each) == FAST
        and had == FAST * tokens
        and abs(all_beside - all_of_them) <= 0.05 * all_of_them,
    )


# -- overload


class Offered:
    """Requests at a fixed rate, whatever becomes of them; each once."""

    def __init__(self, client: Client, rate: float, seconds: float, deadline: float) -> None:
        self.client = client
        self.deadline = deadline
        self.ends: Counter[str] = Counter()
        self.came: list[float] = []  # when answers came
        self.without_time = 0  # BUSY without a retry-after
        self._count = int(rate * seconds)
        self._rate = rate

    async def run(self) -> None:
        self.begun = time.monotonic()
        tasks = []
        for number in range(self._count):
            tasks.append(asyncio.create_task(self._one()))
            if (ahead := self.begun + number / self._rate - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
        self.offered = time.monotonic() - self.begun
        await asyncio.gather(*tasks)

    async def _one(self) -> None:
        try:
            await self.client.request("echo", deadline=self.deadline)
        except Busy as busy:
            self.ends["busy"] += 1
            self.without_time += busy.retry_after <= 0
        except RalmqError as error:
            self.ends[error.code] += 1
        else:
            self.ends["answered"] += 1
            self.came.append(time.monotonic() - self.begun)

    def goodput(self) -> float:
        """Answers a second while requests were offered, the first tenth of that time left out."""
        first = 0.1 * self.offered
        return sum(first <= at < self.offered for at in self.came) / (self.offered - first)


@counted
async def tenfold_overload(folder: Path) -> AsyncIterator[Line]:
    capacity = WORKERS / SLEEP
    url = free_url()
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for _ in range(WORKERS):
            stack.enter_context(worker(folder, url, delay_ms=SLEEP * 1000, capacity=1))
        async with ralmq.connect(url, wait=30) as client:

            async def everyone() -> bool:
                return len((await client.status())["workers"]) == WORKERS

            await until(everyone)
            for seconds, deadline in ((30, 60.0), (30, 1.0))[QUICK:]:
                seconds = size(seconds, 6)
                offered = Offered(client, 10 * capacity, seconds, deadline)
                await offered.run()
                alone = await rate_alone(client, size(200, 40), at_once=2 * WORKERS) / capacity
                share = offered.goodput() / capacity
                ends = dict(offered.ends)
                only = {"answered", "busy"} | ({DeadlineExceeded.code} if deadline < seconds else set())
                yield Line(
                    f"10 x as many requests as {WORKERS} workers that sleep {SLEEP * 1000:.0f} ms can take, deadlines "
                    f"of {deadline:g} s: goodput, of capacity; ends",
                    ">= 0.9; an answer or BUSY with a retry-after"
                    + (", or the deadline" if DeadlineExceeded.code in only else ""),
                    f"{share:.3f} ({alone:.3f} with just enough asked); {ends}",
                    share >= 0.9 and set(ends) <= only and not offered.without_time,
                )

                async def idle() -> bool:
                    return not (await client.status())["broker"]["open_requests"]

                await until(idle)
