"""Cancelled at random places, with real processes: nothing is left of it anywhere."""

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import ralmq
from chaos.run import build
from checkpoints import VOCAB, tiny
from checks import Line, counted, size
from jobs import MODEL
from ralmq.client.client import Client
from ralmq.errors import RalmqError
from serving import Process, broker, free_url, until, worker

AT_ONCE, TOKENS = 24, 40
PLACES = ("queue", "prefill", "decode", "retrieval", "last token")


def started(stack: ExitStack, folder: Path, url: str) -> list[Process]:
    """Two stages with room for few, so that requests wait; prompts in chunks of 8."""
    path = tiny("llama", folder / "model")
    settings = {"model": path, "name": MODEL, "deterministic": 8, "chunk": 8, "capacity": 12, "max_rows": 8}
    made = [stack.enter_context(worker(folder, url, "stage", stage=f"{n}/2", **settings)) for n in range(2)]
    return [*made, stack.enter_context(worker(folder, url, "generator", model=path, name=MODEL))]


class Cancels:
    """Generations that are given up, some by way of the generator, some straight at the pipeline."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.done: Counter[str] = Counter()
        self.ended = 0  # by themselves, before
        self.errors: list[str] = []
        self._chance = random.Random(seed)

    async def run(self, count: int) -> None:
        left = iter(range(count))

        async def one_by_one() -> None:
            for number in left:
                try:
                    await self._one(PLACES[number % len(PLACES)])
                except RalmqError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*[one_by_one() for _ in range(AT_ONCE)])

    async def _one(self, place: str) -> None:
        chance = self._chance
        prompt = [chance.randrange(3, VOCAB) for _ in range(200 if place == "prefill" else chance.randint(2, 30))]
        options: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
        if place == "retrieval" or chance.random() < 0.2:
            options |= {"retrieve": "docs", "k": 4, "knn_temperature": 100.0}
        stop = {"decode": chance.randrange(1, TOKENS), "last token": TOKENS - 1}.get(place, 0)
        if place == "retrieval":
            stop = chance.randrange(1, 6)
        stream: Any = self._asked(prompt, options)
        if stop:
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == stop:
                    break
            await asyncio.sleep(chance.uniform(0.0, 0.03 if place == "retrieval" else 0.005))
        else:
            await asyncio.sleep(chance.uniform(0.0, 0.02 if place == "queue" else 0.3))
        await stream.aclose()
        self.done[place] += 1

    def _asked(self, prompt: list[int], options: dict[str, Any]) -> Any:
        if self._chance.random() < 0.5:
            return self.client.generate(prompt, model=MODEL, deadline=120.0, retries=20, **options)
        retrieval = {key: options.pop(key) for key in ("k", "knn_temperature") if key in options}
        if retrieval:
            options["retrieve"] = {"index": options["retrieve"], **retrieval}
        ids = np.array(prompt, np.int32)
        return self.client.stream(f"lm:{MODEL}", options, tensors=[ids], deadline=120.0, retries=20)


def left_over(status: dict[str, Any]) -> list[str]:
    """What is in use: of the broker's tables, the leader's, the last stage's, and KV blocks."""
    found = [f"{name} {status['broker'][name]}" for name in ("open_requests", "queued_bytes", "held_bytes")]
    found = [text for text in found if not text.endswith(" 0")]
    found += [f"{name} queues {line['queued']}" for name, line in status["services"].items() if line["queued"]]
    for entry in status["workers"]:
        gauges = entry.get("gauges", {})
        used = {name: gauges.get(name, 0) for name in ("sequences", "waiting", "answering")}
        used |= {
            "in_flight": entry["in_flight"],
            "KV blocks": gauges.get("kv_blocks", 0) - gauges.get("free_blocks", 0),
        }
        found += [f"{entry['name']}: {name} {value}" for name, value in used.items() if value]
    return found


async def texts(client: Client) -> list[list[int]]:
    options = {"model": MODEL, "max_tokens": TOKENS, "ignore_eos": True}
    retrieval = {"retrieve": "docs", "k": 4, "knn_temperature": 100.0}
    return [
        [token.id async for token in client.generate([5, 6, 7], **options, **more)]
        for more in ({}, {"temperature": 1.0, "seed": 3}, retrieval)
    ]


@counted
async def cancelled_anywhere(folder: Path) -> AsyncIterator[Line]:
    count = size(1000, 60)
    shutil.copy(Path(__file__).with_name("faulty_workers.py"), folder)
    shutil.copy(Path(__file__).with_name("sleepy_stage.py"), folder)
    url = free_url()
    with ExitStack() as stack:
        processes = [stack.enter_context(broker(folder, url)), *started(stack, folder, url)]
        async with ralmq.connect(url, wait=30) as client:
            await client.request(f"lm:{MODEL}", {"max_tokens": 1}, tensors=[np.array([5], np.int32)], wait_service=60)
            await build(client, folder / "docs")
            arguments = ("faulty_workers:Slow", "--broker", url, "-o", f"index={folder / 'docs'}")
            processes.append(stack.enter_context(Process(folder, "worker", *arguments)))
            await client.request("search:docs", {"info": True}, wait_service=30)
            before = await texts(client)
            workers = sorted((entry["name"], entry["pid"]) for entry in (await client.status())["workers"])
            cancels = Cancels(client, seed=6)
            await cancels.run(count)
            left = ["unknown"]

            async def calm() -> bool:
                nonlocal left
                await asyncio.sleep(0.2)
                left = left_over(await client.status())
                return not left

            with suppress(AssertionError):  # then the line says what is left
                await until(calm, "rest")
            await asyncio.sleep(2.2)  # two more beats
            status = await client.status()
            left = left_over(status)
            same = sorted((entry["name"], entry["pid"]) for entry in status["workers"]) == workers
            lives = sum(process.process.poll() is None for process in processes if process.process is not None)
            after = await texts(client)
    counts = status["broker"]["counts"]
    gauges = [entry["gauges"] for entry in status["workers"] if "kv_blocks" in entry.get("gauges", {})]
    blocks = ", ".join(f"{entry['free_blocks']} of {entry['kv_blocks']} blocks free" for entry in gauges)
    placed = ", ".join(f"{n} {place}" for place, n in cancels.done.items())
    yield Line(
        f"{count} cancels at random places: what is left in tables and KV memory",
        "nothing; no other end than a cancel",
        f"{', '.join(left) or 'nothing'}, {blocks}; {placed}; the broker saw {counts.get('cancelled', 0)} end so; "
        f"errors {cancels.errors[:2]}",
        not left and len(gauges) == 1 and not cancels.errors and sum(cancels.done.values()) == count,
    )
    yield Line(
        "the same: processes that live, workers that are the same, texts after it",
        f"{len(processes)} of {len(processes)}, all, equal",
        f"{lives}, {'all' if same else 'others'}, {'equal' if after == before else 'others'}",
        lives == len(processes) and same and after == before,
    )
