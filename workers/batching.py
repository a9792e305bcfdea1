"""Dynamic batching: requests that arrive close together are served in one call. Knows no message."""

import asyncio
from collections import deque

from .base import Answer, Request, Worker


class Batcher:
    """Collects up to `worker.max_batch` requests, or as many as come within `worker.max_wait` seconds."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._waiting: deque[tuple[Request, asyncio.Future[Answer]]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, request: Request) -> Answer:
        """The answer to one request, computed with others."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((request, future))
        self._arrived.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            end = loop.time() + self._worker.max_wait
            while len(self._waiting) < self._worker.max_batch and (left := end - loop.time()) > 0:
                self._arrived.clear()
                try:
                    await asyncio.wait_for(self._arrived.wait(), left)
                except TimeoutError:
                    break
            batch: list[tuple[Request, asyncio.Future[Answer]]] = []
            while self._waiting and len(batch) < self._worker.max_batch:
                request, future = self._waiting.popleft()
                if not future.done():  # its asker gave up while it waited
                    batch.append((request, future))
            if batch:
                await self._serve(batch)

    async def _serve(self, batch: list[tuple[Request, asyncio.Future[Answer]]]) -> None:
        answers: list[Answer]
        try:
            answers = await self._worker.handle_batch([request for request, _ in batch])
            if len(answers) != len(batch):
                raise TypeError(f"handle_batch got {len(batch)} requests and returned {len(answers)} answers")
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
