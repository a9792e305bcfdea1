"""The schedule: stages kept busy, newcomers and long prompts beside running streams, KV budgets, common prefixes."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ralmq
from checkpoints import VOCAB, tiny
from checks import Line, check
from ralmq.client.client import Client
from serving import broker, free_url, worker
from stage.pipelines import MODEL, generated, lm

HERE = Path(__file__).parent
CALL = 0.02  # seconds of a sleepy stage's call
SETTLED = 2.2  # seconds after which the last beats tell all


@asynccontextmanager
async def pipeline(folder: Path, path: Path, count: int, kind: str = "stage", **options: Any) -> AsyncIterator[Client]:
    """A client of a broker with one pipeline, a process each; it has answered once."""
    url = free_url()
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for place in range(count):
            settings = {"model": path, "stage": f"{place}/{count}", "name": MODEL, **options}
            stack.enter_context(worker(folder, url, kind, **settings))
        async with ralmq.connect(url, wait=30) as client:
            first = [np.array([5], np.int32)]
            await client.request(f"lm:{MODEL}", {"max_tokens": 1}, tensors=first, wait_service=60)
            yield client


async def gauges(client: Client) -> list[dict[str, Any]]:
    """Of the stages in their order, once the last beats are in."""
    await asyncio.sleep(SETTLED)
    status = await client.status()
    of = {entry["name"]: entry["gauges"] for entry in status["workers"]}
    return [of[name] for name in status["pipelines"][0]["stages"]]


async def times(client: Client, prompt: Sequence[int], tokens: int) -> list[float]:
    """When each new token came."""
    stream = lm(client, prompt, max_tokens=tokens, ignore_eos=True)
    return [time.perf_counter() async for _ in stream]


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    return [np.random.default_rng([seed, n]).integers(3, VOCAB, length).tolist() for n in range(count)]


def rate(came: list[list[float]]) -> float:
    """Tokens/s of all sequences while all of them run, the first ten tokens left out."""
    begin, end = max(one[10] for one in came), min(one[-1] for one in came)
    return sum(begin <= at < end for one in came for at in one) / (end - begin)


async def asleep(
    folder: Path, path: Path, stages: int, sequences: int, plane: str = "hub", tokens: int = 150
) -> tuple[float, list[float]]:
    """Tokens/s as a share of what stages without pause would give, and each stage's bubble ratio."""
    shutil.copy(HERE / "sleepy_stage.py", folder)
    async with pipeline(folder, path, stages, "sleepy_stage:Sleepy", data_plane=plane) as client:
        before = await gauges(client)
        came = await asyncio.gather(*[times(client, prompt, tokens) for prompt in prompts(sequences, 4)])
        after = await gauges(client)
    work = after[0]["work_s"] - before[0]["work_s"]
    bubbles = [1 - (a["compute_s"] - b["compute_s"]) / work for a, b in zip(after, before, strict=True)]
    return rate(came) / (sequences / stages / CALL), bubbles


@check
async def stages_kept_busy(folder: Path) -> AsyncIterator[Line]:
    path = tiny("llama", folder / "llama")
    for plane in ("hub", "ring"):
        for stages, sequences, bound in ((2, 4, 0.95), (3, 6, 0.95), (2, 1, 0.92), (3, 1, 0.92)):
            share, _ = await asleep(folder, path, stages, sequences, plane)
            what = f"{plane}, {stages} stages that sleep, {sequences} sequences: rate, of the best possible"
            yield Line(what, f">= {bound}", f"{share:.3f}", share >= bound)
        _, one = await asleep(folder, path, 4, 1, plane)
        shown, near = ", ".join(f"{bubble:.3f}" for bubble in one), all(abs(bubble - 0.75) <= 0.05 for bubble in one)
        yield Line(f"{plane}, 4 stages, 1 sequence: bubble ratios", "0.75 +- 0.05", shown, near)
        _, eight = await asleep(folder, path, 4, 8, plane)
        shown = ", ".join(f"{bubble:.3f}" for bubble in eight)
        yield Line(f"{plane}, 4 stages, 8 sequences: bubble ratios", "< 0.08", shown, max(eight) < 0.08)


@check
async def newcomer(folder: Path) -> AsyncIterator[Line]:
    path = tiny("llama", folder / "llama")
    shutil.copy(HERE / "sleepy_stage.py", folder)
    for stages in (2, 4):
        ring, waits = stages * CALL, []
        async with pipeline(folder, path, stages, "sleepy_stage:Sleepy") as client:
            running = [asyncio.create_task(times(client, p, 120)) for p in prompts(2 * stages, 4)]
            await asyncio.sleep(10 * ring)
            for prompt in prompts(5, 8, seed=1):
                asked = time.perf_counter()
                waits.append((await times(client, prompt, 1))[0] - asked)
                await asyncio.sleep(ring * 0.37)
            await asyncio.gather(*running)
        worst = max(waits) / ring - 1  # its prefill is one ring itself
        what = f"{stages} stages, {2 * stages} streams: a newcomer's first token, ring times after its prefill"
        yield Line(what, "<= 1.5", f"{worst:.2f} at most, of {len(waits)}", worst <= 1.5)


@check
async def long_prompt_beside_streams(folder: Path) -> AsyncIterator[Line]:
    """A tiny Llama with 4k context; a chunk's time is measured from a prompt of the same length alone."""
    path = tiny("llama", folder / "llama4k", max_position_embeddings=4096)
    for stages in (1, 2):
        async with pipeline(folder, path, stages) as client:
            long = prompts(4, 2000, seed=2)
            alone = []
            for prompt in long[:3]:
                asked = time.perf_counter()
                alone.append((await times(client, prompt, 1))[0] - asked)
            chunk = sorted(alone)[1] / np.ceil(2000 / 256) * stages
            running = [asyncio.create_task(times(client, p, 400)) for p in prompts(8, 4, seed=3)]
            await asyncio.sleep(0.5)
            begin = time.perf_counter()
            await times(client, long[3], 1)
            end = time.perf_counter()
            came = await asyncio.gather(*running)
        gaps = [b - a for one in came for a, b in pairwise(one) if a < end and b > begin]
        what = f"{stages} stages, 8 streams, a 2,000-token prompt: largest gap, of a chunk's time through all stages"
        yield Line(what, "<= 2", f"{max(gaps) / chunk:.2f} ({chunk * 1000:.0f} ms)", max(gaps) <= 2 * chunk)


@check
async def kv_budget(folder: Path) -> AsyncIterator[Line]:
    """16 sequences of 8 blocks where 32 blocks are; the reference has room for all."""
    path = tiny("llama", folder / "llama")
    asked = prompts(16, 40)
    async with pipeline(folder, path, 2) as client:
        whole = await asyncio.gather(*[generated(client, prompt, max_tokens=80) for prompt in asked])
    async with pipeline(folder, path, 2, max_rows=2) as client:  # KV blocks for two whole contexts: 32
        tight = await asyncio.gather(*[generated(client, prompt, max_tokens=80) for prompt in asked])
        end = (await gauges(client))[0]
    same = sum(a.tokens == b.tokens for a, b in zip(whole, tight, strict=True))
    yield Line("KV for 4 of 16 sequences: equal to the reference", "16 of 16", f"{same}", same == 16)
    held, peak, anew = end["kv_blocks"] - end["free_blocks"], end["peak_blocks"], end["preempted"]
    what = "KV blocks in use at most, and after; times that a sequence gave its own back"
    yield Line(what, "<= 32, 0, > 0", f"{peak}, {held}, {anew}", peak <= 32 and not held and anew > 0)


@check
async def common_prefix(folder: Path) -> AsyncIterator[Line]:
    path = tiny("llama", folder / "llama1k", max_position_embeddings=1024)
    stem = prompts(1, 512)[0]
    async with pipeline(folder, path, 2) as client:
        counts = [(await gauges(client))[0]["prefilled_tokens"]]
        answers = []
        for tail in ([5, 6, 7], [5, 6, 7], [8, 9]):
            answers.append(await generated(client, [*stem, *tail], max_tokens=10))
            counts.append((await gauges(client))[0]["prefilled_tokens"])
    first, again, other = (b - a for a, b in pairwise(counts))
    yield Line("tokens computed of a 515-token prompt", "515", f"{first}", first == 515)
    what = "and of one with the same 512 tokens in front: the same, another"
    yield Line(what, "< 26", f"{again}, {other}", max(again, other) < 26)
    yield Line("answers to the same prompt", "equal", "equal", answers[0].tokens == answers[1].tokens)
