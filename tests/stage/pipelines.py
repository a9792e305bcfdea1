"""A cluster inside one process, for tests: the real broker over tcp, stages, indexes, one client. Knows no test."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ralmq.broker.limits import Limits
from ralmq.broker.server import Server
from ralmq.client.client import Client, connect
from ralmq.client.stream import Stream
from ralmq.workers.base import Answer, Request, Worker
from ralmq.workers.host import Host
from ralmq.workers.search.worker import Index
from ralmq.workers.stage.worker import Stage
from serving import until

MODEL = "m"


@dataclass
class Cluster:
    """What runs, and the one client of it."""

    url: str
    client: Client
    hosts: list[Host] = field(default_factory=list)

    async def add(self, *workers: Worker) -> None:
        for worker in workers:
            host = Host(worker, self.url)
            await host.open()
            self.hosts.append(host)

    async def kill(self, worker: Worker) -> None:
        """As a process that is gone: its connection ends, without a word. Returns once the broker has noticed."""
        name = worker.host.link.hello.name
        await worker.host.close()
        self.hosts.remove(worker.host)

        async def noticed() -> bool:
            return name not in [gauges["name"] for gauges in await self.gauges()]

        await until(noticed, f"the end of {name}")

    async def gauges(self) -> list[dict[str, Any]]:
        """Of each worker: name, in_flight, and its own gauges, as of its last BEAT."""
        workers = (await self.client.status())["workers"]
        return [{"name": w["name"], "in_flight": w["in_flight"], **w.get("gauges", {})} for w in workers]

    async def settled(self) -> None:
        """Returns once nothing is open, no stage knows a sequence, and every block is free again."""
        leaders = [h.worker for h in self.hosts if isinstance(h.worker, Stage) and h.worker._leader is not None]
        whole = [stage._leader.memory.blocks for stage in leaders if stage._leader is not None]

        async def calm() -> bool:
            gauges = await self.gauges()
            zero = all(not g["in_flight"] and not g.get("sequences") and not g.get("answering") for g in gauges)
            free = [g["free_blocks"] for g in gauges if "free_blocks" in g]
            return zero and sorted(free) == sorted(whole) and not any(host._jobs for host in self.hosts)

        await until(calm, "an idle cluster")
        for host in self.hosts:
            if isinstance(host.worker, Stage):
                last = host.worker._runner.last
                assert last is None or not last._sequences
                leader = host.worker._leader
                assert leader is None or leader.flying == 0


@asynccontextmanager
async def cluster(*workers: Worker) -> AsyncIterator[Cluster]:
    """A broker that beats often, so that gauges are fresh; all workers are announced, in this order."""
    async with Server("tcp://127.0.0.1:*", limits=Limits(beat=0.05)) as server, connect(server.endpoint) as client:
        running = Cluster(server.endpoint, client)
        try:
            await running.add(*workers)
            yield running
        finally:
            for host in running.hosts:
                await host.close()


def stages(path: Path, count: int, **options: Any) -> list[Stage]:
    """One pipeline of an even split."""
    return [Stage(model=str(path), stage=f"{place}/{count}", name=MODEL, **options) for place in range(count)]


class Watched(Index):
    """An index that remembers the vectors of each search, and answers them while `gate` is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[np.ndarray] = []
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def vectors(self) -> int:
        return sum(map(len, self.asked))

    async def handle(self, request: Request) -> Answer:
        if not request.body.get("info"):
            self.asked.append(np.array(request.tensors[0].numpy()))
            await self.gate.wait()
        return await super().handle(request)


class Brake:
    """Holds a stage's compute thread until it is released."""

    def __init__(self, stage: Stage) -> None:
        self._go = threading.Event()
        stage._compute.submit(self._go.wait, 60)

    def release(self) -> None:
        self._go.set()


@dataclass
class Answered:
    """One generation: ids, log p where asked for, and how it ended."""

    tokens: list[int]
    logprobs: list[float | None]
    final: dict[str, Any]
    positions: list[int]


def lm(client: Client, prompt: Sequence[int], deadline: float = 120.0, window: int = 64, **task: Any) -> Stream:
    """A request to the pipeline."""
    ids = np.asarray(prompt, np.int32)
    return client.stream(f"lm:{MODEL}", task, tensors=[ids], deadline=deadline, window=window)


async def generated(client: Client, prompt: Sequence[int], deadline: float = 120.0, **task: Any) -> Answered:
    """All of one generation, past any end of text."""
    stream = lm(client, prompt, deadline, **{"ignore_eos": True, **task})
    bodies = [part.body async for part in stream]
    assert stream.final is not None
    tokens = [body["token"] for body in bodies]
    return Answered(tokens, [b.get("logprob") for b in bodies], stream.final.body, [b["position"] for b in bodies])


async def scored(client: Client, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [n - 1, d] and log p [n - 1] of mode score."""
    parts = [part.tensors async for part in lm(client, ids, mode="score")]
    hidden, logp = zip(*[(np.array(a.numpy()), np.array(b.numpy())) for a, b in parts], strict=True)
    return np.concatenate(hidden), np.concatenate(logp)


def prompts(count: int, seed: int = 0, vocab: int = 128) -> list[list[int]]:
    """Prompts of 1 to 40 ids."""
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, random.integers(1, 41)).tolist() for _ in range(count)]
