"""What runs a worker: a link that serves. Knows requests, credits and drain; nothing of what they are about."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import zmq

from ..client.client import Client
from ..client.link import Link
from ..schema.errors import Malformed, RalmqError, RequestCancelled, WorkerFailed
from ..schema.frame import Prefix
from ..schema.message import Active, Beat, Cancel, Credit, Error, Final, Gone, Hello, Partial, Release, Span
from ..schema.message import Request as Asked
from .base import Request, Worker, answer_parts
from .batching import Batcher

log = logging.getLogger("ralmq.worker")
Key = tuple[bytes, int]  # id and attempt


class Job:
    """One request in hand: its task, and the credit of its stream."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.task: asyncio.Task[Final] | None = None
        self._more = asyncio.Event()

    def grant(self, until: int) -> None:
        if until > self.request.until:
            self.request.until = until
            self._more.set()

    async def may_send(self, sequence: int) -> None:
        """Waits until the reader takes part number `sequence`."""
        while self.request.until and sequence >= self.request.until:
            self._more.clear()
            await self._more.wait()


class Host:
    """Serves one worker over one link.

    Args:
        worker: an instance; its `host` attribute is set, so that it can ask services itself (`host.client`).
        url: the broker's address.
        name: shown in `ralmq status`; a suffix from the connection's nonce is added.
    """

    def __init__(self, worker: Worker, url: str, *, name: str = "", context: zmq.Context[Any] | None = None) -> None:
        self.worker = worker
        self.span: Span | None = None
        self._kind = name or type(worker).__name__.lower()
        self._url = url
        self._context = context
        self._jobs: dict[Key, Job] = {}
        self._turns = 0
        self._batcher = Batcher(worker) if worker.max_batch > 1 else None
        worker.host = self

    async def open(self, wait: float = 5.0) -> None:
        """Starts the worker, then announces it; a broker that is not there yet is waited for.

        Raises:
            NoBroker, Refused: see Link.open.
        """
        await self.worker.start()
        hello = Hello(
            bytes(16),
            self._kind,
            services=self.worker.services,
            capacity=self.worker.capacity,
            idempotent=self.worker.idempotent,
            stall_ms=int(self.worker.stall_limit * 1000),
            labels=self.worker.labels,
            span=self.span,
        )
        self.link = Link(self._url, hello, take=self._take, welcomed=self._anew, beat=self._beat, context=self._context)
        suffix = self.link.hello.nonce[:2].hex()
        self.link.hello = replace(self.link.hello, name=f"{self._kind}-{suffix}")
        self.client = Client(self.link, wait)
        await self.link.open(wait)

    async def drain(self) -> None:
        """Ends in order: no new requests, those in hand are finished, then the link is closed."""
        await self.link.leave()
        if self._jobs:
            await asyncio.wait([job.task for job in self._jobs.values() if job.task is not None], timeout=1.0)
        await self.close()

    async def close(self) -> None:
        """Ends at once."""
        self._anew()
        self.link.close()
        await self.worker.stop()

    # -- what a worker may override or call

    def take(self, prefix: Prefix, message: Any) -> None:
        """Messages that are neither requests nor about one; a stage serves them (see stage/)."""

    def beat(self) -> Beat:
        """Progress of a coroutine worker is the turns of its event loop."""
        self._turns += 1
        active = tuple(Active(*key) for key in list(self._jobs)[:128])
        return Beat(self._turns, len(self._jobs), active)

    # -- inside

    def _beat(self) -> Beat:
        return self.beat()

    def _anew(self) -> None:
        """The broker has forgotten all that was in hand: nobody waits for it."""
        for job in list(self._jobs.values()):
            if job.task is not None:
                job.task.cancel()
        self._jobs.clear()

    def _take(self, prefix: Prefix, message: Any) -> None:
        key = (prefix.id, prefix.attempt)
        if isinstance(message, Asked):
            self._accept(prefix, message)
        elif isinstance(message, Cancel | Release | Gone) and key in self._jobs:
            job = self._jobs[key]
            if job.task is not None:
                job.task.cancel()
        elif isinstance(message, Credit) and key in self._jobs:
            self._jobs[key].grant(message.until)
        else:
            self.take(prefix, message)

    def _accept(self, prefix: Prefix, asked: Asked) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + prefix.deadline / 1000 if prefix.deadline else 0.0
        request = Request(asked.service, asked.body, asked.tensors, prefix.id, prefix.attempt, deadline, asked.window)
        job = Job(request)
        self._jobs[prefix.id, prefix.attempt] = job
        job.task = loop.create_task(self._answer(job))
        job.task.add_done_callback(lambda task: self._done(job, task))

    def _done(self, job: Job, task: asyncio.Task[Final]) -> None:
        """The one end of a job; a callback, since a task that is cancelled before its first step runs no code."""
        request = job.request
        key = (request.id, request.attempt)
        if self._jobs.get(key) is not job:
            return  # the broker forgot it
        del self._jobs[key]
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            self._end(key, Error(RequestCancelled.code, "cancelled"))
        elif error is None:
            self._end(key, task.result())
        elif isinstance(error, RalmqError):
            self._end(key, Error(error.code, error.message[:2000], int(error.retry_after * 1000)))
        else:
            log.error("%s failed in request %s", self._kind, request.id.hex(), exc_info=error)
            text = f"{self._kind} failed: {type(error).__name__}: {error}"
            self._end(key, Error(WorkerFailed.code, f"{text[:1900]} (its log has the place)"))

    def _end(self, key: Key, ending: Final | Error) -> None:
        try:
            self.link.send(ending, id=key[0], attempt=key[1])
        except Malformed as error:
            text = f"the answer of {self._kind} cannot travel: {error.message}"
            self.link.send(Error(WorkerFailed.code, text[:2000]), id=key[0], attempt=key[1])

    async def _answer(self, job: Job) -> Final:
        request = job.request
        if self._batcher is not None:
            return Final(*answer_parts(await self._batcher.submit(request)))
        answer = self.worker.handle(request)
        if not isinstance(answer, AsyncIterator):
            return Final(*answer_parts(await answer))
        sequence = 0
        async with contextlib.aclosing(answer) as parts:  # type: ignore[type-var]
            async for part in parts:
                await job.may_send(sequence)
                self.link.send(Partial(*answer_parts(part)), id=request.id, attempt=request.attempt, sequence=sequence)
                sequence += 1
        return Final(request.ending)
