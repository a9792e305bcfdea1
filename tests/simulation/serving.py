"""The generator and the index shards of a simulation, on the real host. Knows services, no fault."""

import asyncio
import random
from array import array

from ralmq.schema.tensor import Tensor
from ralmq.workers.base import Answer, Request, Worker
from ralmq.workers.generator.worker import Generator
from simulation.process import Server
from simulation.truth import SHARDS, searched
from simulation.world import World


class Texts(Generator):
    """The real generator, of a model without a tokenizer."""

    stall_limit = 1.5

    def __init__(self, capacity: int) -> None:
        super().__init__(model="demo", name="m", capacity=capacity)

    async def start(self) -> None:
        """Nothing to read."""


class Shard(Worker):
    """One shard of the index `docs`: its neighbours follow from the query alone."""

    idempotent = True
    stall_limit = 1.5
    capacity = 3

    def __init__(self, number: int, rng: random.Random, slow: float) -> None:
        self.number = number
        self._rng = rng
        self._slow = slow

    @property
    def services(self) -> tuple[str, ...]:
        return "search:docs", f"search:docs/{self.number}"

    async def handle(self, request: Request) -> Answer:
        """For each query, int64 [n], the best k of this shard: ids int64 [n, k], distances float32 [n, k]."""
        if request.body.get("info"):
            return {"shards": SHARDS, "metric": "l2", "by": "row"}
        await asyncio.sleep(self._slow * self._rng.uniform(0.2, 2.0))
        k = request.body["k"]
        queries = request.tensors[0].numpy().tolist()
        hits = [hit for query in queries for hit in searched(self.number, query, k)]
        ids, distances = array("q", [identity for _, identity in hits]), array("f", [near for near, _ in hits])
        shape = (len(queries), k)
        return {}, [Tensor("i64", shape, ids.tobytes()), Tensor("f32", shape, distances.tobytes())]


def generator(world: World, name: str, capacity: int) -> Server:
    return Server(world, name, Texts(capacity))


def shard(world: World, name: str, number: int) -> Server:
    return Server(world, name, Shard(number, world.rng, world.rng.choice([0.002, 0.02, 0.1])))
