"""What runs a worker: a link that serves. Knows requests, credits and drain; nothing of what they are about."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import zmq

from ..client.client import Client, connect
from ..client.link import Link
from ..schema.errors import Malformed, RalmqError, Refused, RequestCancelled, WorkerFailed
from ..schema.frame import Prefix
from ..schema.limits import MAX_ACTIVE
from ..schema.message import Active, Beat, Bye, Cancel, Credit, Error, Gone, Hello, Partial, Release
from ..schema.message import Final as End
from ..schema.message import Request as Asked
from .base import ELSEWHERE, Answer, Request, Worker, answer_parts
from .batching import Batcher, raisable

log = logging.getLogger("ralmq.worker")
DRAIN: Final = 30.0  # seconds that requests in hand are given to end
CLEAN_UP: Final = 1.0  # seconds that cancelled handlers are given
TURN: Final = 64  # parts after which a stream that never waits lets others run
Key = tuple[bytes, int]  # id and attempt


class Job:
    """One request in hand: its task, and the credit of its stream."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.task: asyncio.Future[Answer] | None = None
        self._more = asyncio.Event()

    def grant(self, until: int) -> None:
        if until > self.request.until:
            self.request.until = until
            self._more.set()
            if self.request.granted is not None:
                self.request.granted()

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
        keys: a key file or a folder of keys, for a broker that asks for one; $RALMQ_KEYS where not given.
        asked_to_leave: called when the broker asks for a drain; where it is not given, the host drains itself.
        failed: called when the worker can serve no more; where it is not given, the host closes itself.
    """

    def __init__(
        self,
        worker: Worker,
        url: str,
        *,
        name: str = "",
        context: zmq.Context[Any] | None = None,
        keys: str | os.PathLike[str] | None = None,
        asked_to_leave: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self.worker = worker
        self.kind = name or type(worker).__name__.lower()
        self.url = url
        self._context = context
        self._keys = keys
        self._jobs: dict[Key, Job] = {}
        self._tasks: set[asyncio.Future[Answer]] = set()  # those that the broker has forgotten, too
        self._turns = 0
        self._closed = False
        self._asked_to_leave = asked_to_leave
        self._failed = failed
        self._leaving: asyncio.Task[None] | None = None
        self._batcher = Batcher(worker) if worker.max_batch > 1 else None
        worker.host = self

    async def open(self, wait: float = 5.0) -> None:
        """Starts the worker, then announces it; a broker that is not there yet is waited for.

        Raises:
            NoBroker, Refused: see Link.open.
        """
        await self.worker.start()
        try:
            await self._announce(wait)
        except BaseException:
            await self.worker.stop()
            raise

    def asking(self, wait: float) -> Client:
        """A client of the same broker, for what a worker must know before it is announced; opened by `async with`."""
        return connect(self.url, wait=wait, name=self.kind, context=self._context, keys=self._keys)

    async def _announce(self, wait: float) -> None:
        if not self.worker.services and self.worker.span is None:
            raise Refused(f'{type(self.worker).__name__} serves nothing: give the class a `service = "name"`')
        hello = Hello(
            bytes(16),
            self.kind,
            services=self.worker.services,
            capacity=max(self.worker.capacity, self.worker.max_batch),
            idempotent=self.worker.idempotent,
            stall_ms=int(self.worker.stall_limit * 1000),
            labels=self._labels(),
            span=self.worker.span,
            direct=self.worker.direct,
        )
        self.link = Link(
            self.url,
            hello,
            take=self._take,
            lost=self._forgotten,
            ready=self._ready,
            beat=self._beat,
            context=self._context,
            keys=self._keys,
        )
        suffix = self.link.hello.nonce[:2].hex()
        self.link.hello = replace(self.link.hello, name=f"{self.kind}-{suffix}")
        self.client = Client(self.link, wait)
        await self.link.open(wait)

    async def drain(self, within: float = DRAIN) -> None:
        """Ends in order: no new requests, those in hand are finished, then the link is closed.

        Args:
            within: seconds after which what is still in hand is cancelled.
        """
        try:
            async with asyncio.timeout(within):
                await self.link.leave()
        except TimeoutError:
            log.warning("%s still had %d requests after %g s", self.kind, len(self._jobs), within)
        await self.close()

    async def close(self) -> None:
        """Ends at once; what is in hand is cancelled. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._forgotten()
        self.link.close()
        try:
            if self._batcher is not None:
                await self._batcher.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLEAN_UP)
        finally:
            await self.worker.stop()

    # -- inside

    def _labels(self) -> dict[str, Any]:
        told = {"identity": self.worker.identity} if self.worker.identity else {}
        return {**self.worker.labels, **told}

    def _beat(self) -> Beat:
        self._turns += 1
        active = tuple(Active(*key) for key in list(self._jobs)[:MAX_ACTIVE])
        return self.worker.beat(Beat(self._turns, len(self._jobs), active))

    def _forgotten(self) -> None:
        """The broker has forgotten all that was in hand: nobody waits for it."""
        for job in list(self._jobs.values()):
            if job.task is not None:
                job.task.cancel()
        self._jobs.clear()
        self.worker.forgotten()

    async def _ready(self) -> bool:
        """Whether the worker may be announced again, once that is known; else it ends."""
        try:
            await self.worker.ready()
        except Exception as error:
            if self._failed is not None:
                self._failed(error)
            elif self._leaving is None:
                log.critical("%s can serve no more: %s", self.link.hello.name, error)
                self._leaving = asyncio.get_running_loop().create_task(self.close())
            return False
        return True

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
        elif isinstance(message, Bye):
            if self._asked_to_leave is not None:
                self._asked_to_leave()
            elif self._leaving is None:
                self._leaving = asyncio.get_running_loop().create_task(self.drain())
        else:
            self.worker.take(prefix, message)

    def _accept(self, prefix: Prefix, asked: Asked) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + prefix.deadline / 1000 if prefix.deadline else 0.0
        request = Request(asked.service, asked.body, asked.tensors, prefix.id, prefix.attempt, deadline, asked.window)
        request.priority, request.wait = asked.priority, asked.wait_ms / 1000
        job = Job(request)
        self._jobs[prefix.id, prefix.attempt] = job
        job.task = self._begun(job)
        self._tasks.add(job.task)
        job.task.add_done_callback(lambda task: self._done(job, task))

    def _begun(self, job: Job) -> asyncio.Future[Answer]:
        """The future of the answer: a task, or what gathers a batch, which needs none for each request."""
        if self._batcher is not None:
            return self._batcher.submit(job.request)
        loop = asyncio.get_running_loop()
        try:
            answer = self.worker.handle(job.request)
        except Exception as error:
            failed: asyncio.Future[Answer] = loop.create_future()
            failed.set_exception(raisable(error))
            return failed
        if isinstance(answer, asyncio.Future):
            return answer
        if asyncio.iscoroutine(
            answer
        ):  # as it is: one that waits within another is never begun where that is cancelled
            return loop.create_task(answer)
        return loop.create_task(self._answer(job, answer))

    def _done(self, job: Job, task: asyncio.Future[Answer]) -> None:
        """The one end of a job; a callback, since a task that is cancelled before its first step runs no code."""
        self._tasks.discard(task)
        request = job.request
        key = (request.id, request.attempt)
        current = self._jobs.get(key) is job
        if current:
            del self._jobs[key]
        try:
            ending = self._ending(request, task)
            if ending is not None and current:  # else another peer has sent it, or the broker forgot the request
                self.link.send(ending, id=key[0], attempt=key[1])
        except Exception as error:  # whatever is wrong with an answer, its request must end
            reason = error.message if isinstance(error, RalmqError) else f"{type(error).__name__}: {error}"
            text = f"the answer of {self.kind} cannot travel: {reason}"
            self.link.send(Error(WorkerFailed.code, text), id=key[0], attempt=key[1])

    def _ending(self, request: Request, task: asyncio.Future[Answer]) -> End | Error | None:
        if task.cancelled():
            return Error(RequestCancelled.code, "cancelled")
        error = task.exception()
        if error is None:
            answer = task.result()
            try:
                return None if answer is ELSEWHERE else End(*answer_parts(answer))
            except TypeError as wrong:
                error = wrong
        if isinstance(error, RalmqError):
            return Error(error.code, error.message, int(error.retry_after * 1000), error.worker)
        log.error("%s failed in request %s", self.kind, request.id.hex(), exc_info=error)
        text = f"{self.kind} failed: {type(error).__name__}: {error}"
        return Error(WorkerFailed.code, f"{text[:1900]} (its log has the place)")

    async def _answer(self, job: Job, answer: Awaitable[Answer] | AsyncIterator[Answer]) -> Answer:
        request = job.request
        if not isinstance(answer, AsyncIterator):
            return await answer
        sequence = 0
        async with contextlib.aclosing(answer) as parts:  # type: ignore[type-var]
            async for part in parts:
                await job.may_send(sequence)
                self._send_part(request, sequence, Partial(*answer_parts(part)))
                sequence += 1
                if not sequence % TURN:
                    await asyncio.sleep(0)
        return request.ending

    def _send_part(self, request: Request, sequence: int, part: Partial) -> None:
        try:
            self.link.send(part, id=request.id, attempt=request.attempt, sequence=sequence)
        except Malformed as error:
            raise WorkerFailed(f"part {sequence} of {self.kind}'s answer cannot travel: {error.message}") from None
