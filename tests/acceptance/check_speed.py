"""Real compute, GPT-2 124M with random weights, stages of one thread: batching, pipelining, and the systems before."""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from checks import Line, Point, check
from ralmq.demo.texts import Shares, numpy_texts
from ralmq.workers.engine.config import read_config
from ralmq.workers.models import resolve
from stage.pipelines import scored
from timing import Other, Run, gpt2, other, ours, prompts, ratio, spread, together
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

ROUNDS = int(os.environ.get("RALMQ_ROUNDS", "5"))  # fewer for a rough look
MARGIN = 1e-4
Times = dict[str, list[float]]


def at_least(what: str, bound: float, above: list[float], below: list[float], *points: Point) -> Line:
    measured = ratio(above, below)
    return Line(what, f">= {bound:.2f}", spread(above, below), measured >= bound, points)


async def rounds(jobs: dict[str, Callable[[], Awaitable[Run]]], value: Callable[[Run], float]) -> Times:
    """Each job in turn, so many rounds over."""
    found: Times = defaultdict(list)
    for number in range(ROUNDS + 1):
        for name, job in jobs.items():
            measured = value(await job())
            if number:  # the first round warms up
                found[name].append(measured)
    return found


async def ceiling(one: Other, two: Other) -> float:
    """How much more two processes read at once than one: a token of one row reads every weight once."""
    alone = await one.run([[0]], 24)
    both = await asyncio.gather(one.run([[0]], 24), two.run([[0]], 24))
    return sum(run.rate for run in both) / alone.rate


@check
async def pipelining_and_batching(folder: Path) -> AsyncIterator[Line]:
    path, asked = gpt2(), prompts(16)
    systems = {
        "ours": ours(folder, path),
        "unbatched": ours(folder, path, max_rows=1),
        "one": other("one_process.py", path, "1"),
        "two": other("one_process.py", path, "2", threads=2),
        "read": other("read_memory.py"),
        "read too": other("read_memory.py"),
    }
    async with together(**systems) as up:
        jobs = {
            "one process, 1": lambda: up["one"].run(asked[:1], 36),
            "1": lambda: up["ours"].run(asked[:1], 36),
            "2": lambda: up["ours"].run(asked[:2], 36),
            "16": lambda: up["ours"].run(asked, 28),
            "one process of two threads, 16": lambda: up["two"].run(asked, 28),
            "unbatched, 16": lambda: up["unbatched"].run(asked, 11),
        }
        found = await rounds(jobs, lambda run: run.rate)
        memory = [await ceiling(up["read"], up["read too"]) for _ in range(ROUNDS)]
    rates = {name: median(values) for name, values in found.items()}
    for what, bound, name, against in (
        ("two sequences in flight, of one", 1.75, "2", "1"),
        ("one sequence, of one process with one thread", 0.90, "1", "one process, 1"),
        ("16 sequences, of one process with two threads", 0.85, "16", "one process of two threads, 16"),
        ("16 sequences, of the same without batching", 4.0, "16", "unbatched, 16"),
    ):
        yield at_least(f"2 stages: tokens/s, {what}", bound, found[name], found[against])
    target = ratio(found["16"], found["one process of two threads, 16"])
    yield Line("the same against one process with two threads", "(>= 1.00)", f"{target:.2f}", target >= 1, (), False)
    what = "what bounds it: bytes/s that two processes read from memory at once, of one alone"
    yield Line(what, "printed", f"{median(memory):.2f} ({min(memory):.2f} to {max(memory):.2f})", True)
    shown = ", ".join(f"{name}: {rate:.1f}" for name, rate in rates.items())
    bars = tuple(
        Point("Tokens per second, GPT-2 124M in fp32, 2 stages", name, "tokens/s", rate) for name, rate in rates.items()
    )
    yield Line("tokens/s", "printed", shown, True, bars)


@check
async def against_the_systems_before(folder: Path) -> AsyncIterator[Line]:
    """Seconds from the prompts to the last token, the same for all; see tests/baselines for what each does."""
    path, asked = gpt2(), prompts(2)
    systems = {
        "ours": ours(folder, path),
        "ring": other("pickled_ring.py", path),
        "whole": other("rpc_pipeline.py", path, "whole"),
        "cache": other("rpc_pipeline.py", path, "cache"),
    }
    async with together(**systems) as up:
        runs: dict[str, Run] = {}

        def job(name: str, system: str, sequences: int, tokens: int, **how: bool) -> Callable[[], Awaitable[Run]]:
            async def run() -> Run:
                runs[name] = await up[system].run(asked[:sequences], tokens, **how)
                return runs[name]

            return run

        cells = [(f"{name} {n} x {tokens}", name, n, tokens) for name, n, tokens in _ASKED]
        jobs = {name: job(name, system, n, tokens) for name, system, n, tokens in cells}
        jobs["cache in turn 2 x 32"] = job("cache in turn 2 x 32", "cache", 2, 32, together=False)
        found = await rounds(jobs, lambda run: run.seconds)
    for what, bound, system, name in (
        ("a ring of pickled tensors, whole context: 2 sequences, 16 tokens", 3.0, "ring 2 x 16", "ours 2 x 16"),
        ("the same, 64 tokens", 4.0, "ring 2 x 64", "ours 2 x 64"),
        ("an rpc pipeline, whole context: 1 sequence, 32 tokens", 2.0, "whole 1 x 32", "ours 1 x 32"),
        ("an rpc pipeline with a cache: 1 sequence, 32 tokens", 0.95, "cache 1 x 32", "ours 1 x 32"),
        ("the same, 2 sequences one after the other", 1.7, "cache in turn 2 x 32", "ours 2 x 32"),
    ):
        bar = Point("Times as fast as", what, "ralmq, 2 stages", ratio(found[system], found[name]))
        yield at_least(f"speed, against {what}", bound, found[system], found[name], bar)
    step = spread(found["cache 2 x 32"], found["ours 2 x 32"])
    yield Line("speed, against the same, 2 sequences at once, in step", "printed", step, True)
    wrong, close, total = compared(path, asked, runs.values())
    yield Line(
        "tokens of all systems that are not transformers'", f"0 of {total}", f"{wrong}; near ties {close}", not wrong
    )


_ASKED = (
    ("ours", 1, 32),
    ("cache", 1, 32),
    ("whole", 1, 32),
    ("ours", 2, 32),
    ("cache", 2, 32),
    ("ours", 2, 16),
    ("ring", 2, 16),
    ("ours", 2, 64),
    ("ring", 2, 64),
)


def compared(path: Path, asked: list[list[int]], runs: Iterable[Run]) -> tuple[int, int, int]:
    """Tokens that are not the best given those before, near ties apart; and how many there are."""
    model = GPT2LMHeadModel.from_pretrained(path).eval()
    wrong = close = total = 0
    for run in runs:
        for prompt, tokens in zip(asked, run.tokens, strict=False):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            best = logits.topk(2)
            sure = best.values[:, 0] - best.values[:, 1] > MARGIN
            wrong += int((best.indices[sure, 0] != torch.tensor(tokens)[sure]).sum())
            close += int((~sure).sum())
            total += len(tokens)
    return wrong, close, total


@check
async def int8(folder: Path) -> AsyncIterator[Line]:
    """One stage of one thread, through the broker; fp32 as it comes, and with its matrices as torch has them."""
    path, asked = gpt2(), prompts(16)
    kinds = {
        "fp32": ours(folder, path, ["0:12"]),
        "fp32, packed=false": ours(folder, path, ["0:12"], packed="false"),
        "int8": ours(folder, path, ["0:12"], dtype="int8"),
    }
    async with together(**kinds) as up:
        jobs = {
            f"{kind}, {n}": partial(up[kind].run, asked[:n], tokens) for n, tokens in ((1, 36), (16, 20)) for kind in up
        }
        found = await rounds(jobs, lambda run: run.rate)
    for count, bound in ((1, 2.2), (16, 2.7)):
        fast = found[f"int8, {count}"]
        bars = tuple(
            Point("Tokens per second, int8 and fp32", f"{count} at a time", kind, median(found[f"{kind}, {count}"]))
            for kind in kinds
        )
        for kind in ("fp32", "fp32, packed=false"):
            yield at_least(
                f"1 stage, {count} at a time: int8 tokens/s, of {kind}", bound, fast, found[f"{kind}, {count}"], *bars
            )


@check
async def int8_perplexity(folder: Path) -> AsyncIterator[Line]:
    """The embedded model on docstrings that it was not trained on, each on its own, through two stages."""
    _, path = resolve("demo")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    texts = numpy_texts(tokenizer, Shares(1000, 1000, 8000)).held_out
    found = {}
    for kind in ("fp32", "int8"):
        async with ours(folder, path, ("0:2", f"2:{read_config(path).layers}"), dtype=kind) as up:
            scores = []
            for text in texts:
                ids = tokenizer.encode(text.text).ids[: read_config(path).context]
                scores.append((await scored(up.client, ids))[1])
        log_p = np.concatenate(scores).astype(np.float64)
        found[kind] = float(np.exp(-log_p.mean()))
    rise = found["int8"] / found["fp32"] - 1
    shown = f"{100 * rise:+.2f} % ({found['fp32']:.3f} to {found['int8']:.3f}, {len(log_p)} tokens)"
    yield Line("perplexity of the embedded model with int8", "< +1 %", shown, rise < 0.01)
