"""Dynamic batching: requests that arrive close together are served in one call. Knows no message."""

import asyncio
from typing import Any

from ..schema.errors import RequestCancelled, WorkerFailed
from .base import Answer, Request, Worker

Waiting = dict[asyncio.Future[Answer], Request]


class Batcher:
    """Collects up to `worker.max_batch` requests, or as many as come within `worker.max_wait` seconds.

    One batch is served at a time, so that the next one fills meanwhile.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: Waiting = {}
        self._served: Waiting = {}
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._call: asyncio.Task[Any] | None = None

    def submit(self, request: Request) -> asyncio.Future[Answer]:
        """The answer to one request, computed with others; cancelled, the others go on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        future.add_done_callback(self._given_up)
        self._waiting[future] = request
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        return future

    async def close(self) -> None:
        """Ends what is being served."""
        tasks = [task for task in (self._task, self._call) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _given_up(self, future: asyncio.Future[Answer]) -> None:
        if not future.cancelled():
            return
        self._waiting.pop(future, None)
        if future in self._served and self._call is not None and all(other.done() for other in self._served):
            self._call.cancel()  # nobody waits for any of the answers

    async def _run(self) -> None:
        while self._waiting:
            if not self._full:
                await self._fill()
            batch = self._begun()
            while batch:
                call = self._call
                assert call is not None
                await asyncio.wait([call])
                following = self._begun() if self._full else {}  # first: it shall not wait until the answers are sent
                self._answer(batch, call)
                batch = following

    @property
    def _full(self) -> bool:
        """Whether the next batch need not wait for more."""
        return not self._worker.max_wait or len(self._waiting) >= self._worker.max_batch

    def _begun(self) -> Waiting:
        """Begins to serve what waits, as far as it is one batch, and returns it."""
        batch = dict(list(self._waiting.items())[: self._worker.max_batch])
        for future in batch:
            del self._waiting[future]
        if batch:
            self._served = batch
            self._call = asyncio.ensure_future(self._handled(list(batch.values())))
        return batch

    async def _fill(self) -> None:
        try:
            async with asyncio.timeout(self._worker.max_wait):
                while len(self._waiting) < self._worker.max_batch:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            pass

    def _answer(self, batch: Waiting, call: asyncio.Task[Any]) -> None:
        for future, answer in zip(batch, self._answers(call, len(batch)), strict=True):
            if future.done():
                continue  # its asker gave up
            if isinstance(answer, Exception):
                future.set_exception(raisable(answer))
            else:
                future.set_result(answer)

    async def _handled(self, requests: list[Request]) -> Any:
        """In a coroutine of its own, so that whatever a `handle_batch` raises, async or not, is an answer."""
        return await self._worker.handle_batch(requests)

    def _answers(self, call: asyncio.Task[Any], count: int) -> list[Answer]:
        """What the worker returned, or its failure once for each request."""
        if call.cancelled():
            return [RequestCancelled("the batch was cancelled")] * count
        error = call.exception()
        if error is not None:
            return [error] * count
        answers = call.result()
        if isinstance(answers, list | tuple) and len(answers) == count:
            return list(answers)
        returned = f"{len(answers)} answers" if isinstance(answers, list | tuple) else f"a {type(answers).__name__}"
        text = f"handle_batch got {count} requests and returned {returned}: it must return a list, one answer each"
        return [WorkerFailed(text)] * count


def raisable(error: Exception) -> Exception:
    """As a future takes it, which takes no StopIteration; a coroutine that raises one raises this, too."""
    return RuntimeError(f"raised StopIteration: {error}") if isinstance(error, StopIteration) else error
