"""GPT-2 124M under the clock: our pipelines and systems of other processes, asked the same. Knows no bound."""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import ralmq
import torch
from ralmq.client.client import Client
from serving import broker, free_url, worker
from stage.pipelines import MODEL, lm
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB = 50257
# The head is read from memory as 5.5 layers are: with this cut both stages compute for about the same time.
BALANCED = ("0:8", "8:12")
BASELINES = Path(__file__).parents[1] / "baselines"
SETTLING = 4  # first tokens of each sequence that a rate leaves out


@dataclass(frozen=True, slots=True)
class Run:
    """What one system did for some prompts: seconds in all, and of each prompt the tokens and when they came."""

    seconds: float
    tokens: list[list[int]]
    came: list[list[float]]

    @property
    def rate(self) -> float:
        """Tokens/s of all sequences while all of them run, without prompts and the first few tokens."""
        begin, end = max(one[SETTLING] for one in self.came), min(one[-1] for one in self.came)
        return sum(begin < at <= end for one in self.came for at in one) / (end - begin)


@cache
def _held() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ralmq-gpt2-")


@cache
def gpt2(shard: str = "5GB") -> Path:
    """GPT-2 124M with random weights, in files of at most that size; gone with the process."""
    torch.manual_seed(0)
    path = Path(_held().name) / shard
    GPT2LMHeadModel(GPT2Config()).save_pretrained(path, max_shard_size=shard)
    return path


def prompts(count: int, length: int = 16) -> list[list[int]]:
    return [np.random.default_rng([length, n]).integers(0, VOCAB, length).tolist() for n in range(count)]


class Ours:
    """A pipeline, asked through the broker."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def run(self, asked: Sequence[Sequence[int]], tokens: int, **task: Any) -> Run:
        begun = time.perf_counter()

        async def one(prompt: Sequence[int]) -> list[tuple[int, float]]:
            stream = lm(self.client, prompt, max_tokens=tokens, ignore_eos=True, **task)
            return [(part.body["token"], time.perf_counter() - begun) async for part in stream]

        found = await asyncio.gather(*[one(prompt) for prompt in asked])
        taken = time.perf_counter() - begun
        return Run(taken, [[token for token, _ in one] for one in found], [[at for _, at in one] for one in found])


@asynccontextmanager
async def ours(folder: Path, path: Path, cuts: Sequence[str] = BALANCED, **options: Any) -> AsyncIterator[Ours]:
    """A broker and a stage for each of the cuts, a process of one thread each; it has answered once."""
    url = free_url()
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for layers in cuts:
            stack.enter_context(worker(folder, url, "stage", model=path, layers=layers, name=MODEL, **options))
        async with ralmq.connect(url, wait=60) as client:
            first = [np.array([5, 6], np.int32)]
            await client.request(f"lm:{MODEL}", {"max_tokens": 4}, tensors=first, wait_service=120, deadline=180)
            yield Ours(client)


class Other:
    """A script of tests/baselines as a process; see talk.py there."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> dict[str, Any]:
        """Its next answer; an error where it ends or takes far too long."""
        assert self._process.stdout is not None
        async with asyncio.timeout(300):
            while True:
                line = await self._process.stdout.readline()
                assert line, "the process has ended: see what it wrote above"
                if line.startswith(b"{"):
                    found: dict[str, Any] = json.loads(line)
                    return found

    async def run(self, asked: Sequence[Sequence[int]], tokens: int, *, together: bool = True) -> Run:
        assert self._process.stdin is not None
        request = {"prompts": list(map(list, asked)), "tokens": tokens, "together": together}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return Run(**await self.line())


@asynccontextmanager
async def other(script: str, *arguments: str | Path, threads: int = 1) -> AsyncIterator[Other]:
    """One of those, ready; what it says on stderr is kept away unless it fails."""
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            script,
            *map(str, arguments),
            cwd=BASELINES,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=1 << 24,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"},
        )
        system = Other(process)
        try:
            await system.line()
            yield system
        except AssertionError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def together(**systems: Any) -> AsyncIterator[dict[str, Any]]:
    """Several of these at once, by name; all but the one that is asked are idle."""
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(system) for name, system in systems.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median([a / b for a, b in zip(above, below, strict=True)])


def spread(above: Sequence[float], below: Sequence[float]) -> str:
    """That median, and the least and the greatest."""
    every = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(every):.2f} ({min(every):.2f} to {max(every):.2f})"
