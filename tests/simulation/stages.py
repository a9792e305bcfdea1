"""Stages of a pipeline on the real host: the real leader, and a computation that keeps hashes where KV would be.

Knows what workers/stage/worker.py and last.py do with messages, and no layer.
"""

import asyncio
from array import array
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from ralmq.client.fanout import Fanout
from ralmq.client.results import Reply
from ralmq.schema.errors import RalmqError, WorkerLost
from ralmq.schema.frame import RETURN, Prefix
from ralmq.schema.limits import LOSSES, NO_ID
from ralmq.schema.message import Beat, Error, Final, Form, Gone, Partial, Return, Row, Span, Step
from ralmq.schema.tensor import Tensor
from ralmq.workers.base import ELSEWHERE, Answer, Request, Worker
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.params import Task
from ralmq.workers.stage.batch import Batch, Key, Sequence
from ralmq.workers.stage.leader import Leader
from simulation.invariants import holds
from simulation.process import Server
from simulation.truth import START, digest, grown, sampled
from simulation.world import World

CONTEXT = 200


@dataclass(slots=True, eq=False)
class Sampled:
    """What the last stage keeps of a sequence."""

    task: Task
    start: int  # absolute position of the first new token, before any replay
    limit: int
    total: int
    made: int = 0


@dataclass(slots=True, eq=False)
class Cache:
    """The KV slots of one stage: each holds the hash of all tokens up to its own."""

    slots: dict[int, int] = field(default_factory=dict)
    begins: dict[int, int] = field(default_factory=dict)  # of each block, the hash in front of it

    def write(self, row: Row, tokens: list[int]) -> int:
        """The hash behind the row's tokens.

        Raises:
            Broken: a block in front of them holds something else than what they follow.
        """
        position, blocks = row.position, row.blocks
        for place in range(1, -(-position // BLOCK)):
            before = self.slots.get(blocks[place - 1] * BLOCK + BLOCK - 1)
            if before is None or before != self.begins.get(blocks[place]):
                holds(False, "a row reads a KV block that holds other tokens", row.id)
        value = START if not position else self._at(blocks, position - 1, row.id)
        for token in tokens:
            block, slot = blocks[position // BLOCK], position % BLOCK
            if not slot:
                self.begins[block] = value
            value = grown(value, token)
            self.slots[block * BLOCK + slot] = value
            position += 1
        return value

    def _at(self, blocks: tuple[int, ...], position: int, identity: bytes) -> int:
        value = self.slots.get(blocks[position // BLOCK] * BLOCK + position % BLOCK)
        if value is None:
            holds(False, "a row reads a KV slot that was never written", identity)
            raise AssertionError
        return value


class Stage(Worker):
    """One span of the model `m`."""

    stall_limit = 1.5

    def __init__(self, world: World, span: tuple[int, int], layers: int, idempotent: bool, blocks: int) -> None:
        self.world = world
        self.capacity = 6
        self.idempotent = idempotent
        self.offer = Span("m", "f", *span, layers, kv_blocks=blocks + span[0], max_rows=4, context=CONTEXT)
        self.pace = world.rng.choice([0.002, 0.01])
        self.server: Server
        self.pipeline = NO_ID
        self.form = Form("m", 0, 1, 0, 0)
        self.leader: Leader | None = None
        self.cache = Cache()
        self.known: dict[Key, Sampled] = {}  # at the last stage
        self.progress = 0
        self.fanout = Fanout(self._ask)
        self.steps: deque[Step] = deque()  # that wait for the computation

    @property
    def span(self) -> Span:
        return self.offer

    async def handle(self, request: Request) -> Answer:
        """As the real stage: the leader gets it, the last stage answers it."""
        leader = self.leader
        task = Task.of(request.body)
        ids = request.tensors[0].numpy().tolist()
        limit = min(task.max_tokens, CONTEXT - len(ids))
        params = {"task": request.body, "limit": limit}
        self.world.oracle.executes(request.id, self.server.name, not self.idempotent)
        if leader is None:
            raise WorkerLost("the pipeline is over: ask again")
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key = (request.id, request.attempt)

        def over() -> None:
            if not ended.done():
                ended.set_result(None)

        def granted() -> None:
            leader.granted(key)
            self._drive()

        need = len(ids) + limit - 1
        leader.add(Sequence(*key, ids, params, need, lambda: request.until, over, request.priority))
        request.granted = granted
        self._drive()
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            leader.cancel(key)
            self._drive()
            await ended
            raise
        return ELSEWHERE

    def take(self, prefix: Prefix, message: Any) -> None:
        if isinstance(message, Form):
            holds(self.pipeline == NO_ID, f"{self.server.name}: FORM while it is in a pipeline")
            self._over()
            self.pipeline, self.form = prefix.id, message
            if message.place == 0:
                self.leader = Leader(message.stages, message.kv_blocks, message.max_rows, 24)
        elif isinstance(message, Gone) and prefix.id == self.pipeline:
            self._over()
        elif isinstance(message, Step):
            holds(prefix.id == self.pipeline, f"{self.server.name} got a STEP of another pipeline")
            if prefix.flags & RETURN:
                self._returned(message.batch, message.returns)
            else:
                self._run(message)

    def forgotten(self) -> None:
        self._over()

    def beat(self, beat: Beat) -> Beat:
        return replace(beat, progress=self.progress, busy=len(self.steps))

    @property
    def left(self) -> tuple[int, int, int]:
        """Sequences, blocks that are not free, and what the last stage knows."""
        leader = self.leader
        if leader is None:
            return 0, 0, len(self.known)
        return len(leader), leader.memory.blocks - leader.memory.available, len(self.known)

    # -- the schedule

    def _over(self) -> None:
        leader, self.leader = self.leader, None
        self.pipeline = NO_ID
        self.known.clear()
        self.cache = Cache()
        self.steps.clear()
        if leader is not None:
            leader.abandon()

    def _drive(self) -> None:
        if self.leader is not None:
            while (batch := self.leader.next()) is not None:
                self._run(_step_of(batch))

    def _run(self, step: Step) -> None:
        """Takes its time, one STEP after the other, in order."""
        self.steps.append(step)
        if len(self.steps) == 1:
            self._soon()

    def _soon(self) -> None:
        seconds = self.pace * self.world.rng.uniform(0.2, 2.0)
        asyncio.get_running_loop().call_later(seconds, self._compute, self.pipeline)

    def _compute(self, pipeline: bytes) -> None:
        if pipeline != self.pipeline:
            return
        if self.server.hangs:
            asyncio.get_running_loop().call_later(0.5, self._compute, pipeline)
            return
        step = self.steps.popleft()
        if self.steps:
            self._soon()
        self.progress += 1
        hashes = self._hashes(step)
        if self.form.place < self.form.stages - 1:
            self.server.link.send(step, id=pipeline)  # type: ignore[union-attr]
        else:
            self._last(step, hashes)

    def _hashes(self, step: Step) -> list[int]:
        ids = array("q", bytes(step.tensors[0].buffer)) if step.rows else array("q")
        hashes: list[int] = []
        at = 0
        for row in step.rows:
            hashes.append(self.cache.write(row, list(ids[at : at + row.length])))
            at += row.length
        return hashes

    # -- the last stage

    def _last(self, step: Step, hashes: list[int]) -> None:
        for start in step.starts:
            row = step.rows[start.row]
            task = Task.of(start.params["task"])
            known = Sampled(task, task.prompt or start.length, start.params["limit"], start.length)
            self.known[row.id, row.attempt] = known
        returns: list[Return] = []
        for row, value in zip(step.rows, hashes, strict=True):
            key = (row.id, row.attempt)
            known = self.known.get(key)
            if known is None:
                returns.append(Return(*key, -1, True))
            elif row.position + row.length == known.total:
                retrieval = known.task.retrieve
                if retrieval is not None and (known.total - known.start) % retrieval.interval == 0:
                    self._search(key, known, value)
                else:
                    returns.append(self._sampled(key, known, value, 0))
        for over in step.ended:
            self.known.pop((over.id, over.attempt), None)
            returns.append(Return(over.id, over.attempt, -1, True))
        if step.batch or returns:
            self._give_back(step.batch, tuple(returns))

    def _sampled(self, key: Key, known: Sampled, value: int, found: int) -> Return:
        """One PARTIAL; that of the last token says so, and the FINAL follows."""
        task = known.task
        token = sampled(value, task.seed if task.temperature else -1, known.total, found)
        done = token in task.stop_ids or known.made + 1 >= known.limit
        body: dict[str, Any] = {"token": token, "position": known.total, "logprob": float(value % (1 << 52))}
        if done:
            body["ended"] = "stop" if token in task.stop_ids else "length"
        self._send(Partial(body), key, known.made)
        known.made += 1
        known.total += 1
        if done:
            del self.known[key]
            ending = {"finish_reason": body["ended"], "completion_tokens": known.made}
            self._send(Final(ending), key)
        return Return(*key, token, done)

    def _send(self, message: Any, key: Key, sequence: int = 0) -> None:
        self.server.link.send(message, id=key[0], attempt=key[1], sequence=sequence)  # type: ignore[union-attr]

    def _search(self, key: Key, known: Sampled, value: int) -> None:
        asyncio.get_running_loop().create_task(self._searched(key, known, value, self.pipeline))

    async def _searched(self, key: Key, known: Sampled, value: int, pipeline: bytes) -> None:
        """Samples the parked row once its neighbours are there; an error ends it."""
        assert known.task.retrieve is not None
        try:
            found = await self._found(value, known.task.retrieve.k)
        except RalmqError as error:
            if self.pipeline == pipeline and self.known.get(key) is known:
                del self.known[key]
                self._send(Error(error.code, error.message[:2000]), key)
                self._give_back(0, (Return(*key, -1, True),))
            return
        if self.pipeline == pipeline and self.known.get(key) is known:
            self._give_back(0, (self._sampled(key, known, value, found),))

    async def _found(self, query: int, k: int) -> int:
        """What all shards together find; asked again where a server is lost."""
        losses = 0
        body = {"k": k, "following": False, "payloads": False}
        while True:
            try:
                end = asyncio.get_running_loop().time() + 4.0
                reply = await self.fanout.search("docs", body, [Tensor("i64", (1,), query.to_bytes(8, "little"))], end)
                ids, distances = [tensor.numpy()[0].tolist() for tensor in reply.tensors]
                return digest(zip(distances, ids, strict=True))
            except WorkerLost:
                losses += 1
                if losses >= LOSSES:
                    raise

    async def _ask(self, service: str, body: dict[str, Any], tensors: Any, end: float) -> Reply:
        left = max(0.001, end - asyncio.get_running_loop().time())
        return await self.host.client.request(
            service, body, tensors=tensors, deadline=left, wait_service=left, retries=3, priority=6
        )

    def _give_back(self, number: int, returns: tuple[Return, ...]) -> None:
        if self.leader is not None:
            self._returned(number, returns)
        else:
            step = Step(returns=returns, batch=number)
            self.server.link.send(step, id=self.pipeline, flags=RETURN)  # type: ignore[union-attr]

    def _returned(self, number: int, returns: tuple[Return, ...]) -> None:
        if self.leader is not None:
            self.leader.returned(number, returns)
            self._drive()


def _step_of(batch: Batch) -> Step:
    tensors = [Tensor("i64", (len(batch.ids),), array("q", batch.ids).tobytes())] if batch.rows else []
    return Step(tuple(batch.rows), tuple(batch.starts), (), tuple(batch.ended), batch.number, tensors)


def stage(world: World, name: str, span: tuple[int, int], layers: int, idempotent: bool, blocks: int) -> Server:
    """A process that serves one span."""
    worker = Stage(world, span, layers, idempotent, blocks)
    worker.server = Server(world, name, worker)
    return worker.server
