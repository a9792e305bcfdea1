"""A job over the rows of a file: each asked once, so many at a time, kept as it is answered, gone on with after a kill.

Knows errors and files; what a row asks is a function that is given.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..schema.errors import (
    Busy,
    ConnectionClosed,
    DeadlineExceeded,
    NoBroker,
    NoService,
    RalmqError,
    RequestCancelled,
    WorkerLost,
)
from .client import Client
from .journal import Journal, Rows
from .losses import Losses
from .results import Reply

ELSEWHERE: Final = (NoService, NoBroker, ConnectionClosed, RequestCancelled)  # faults that are no row's
LOOK: Final = 5.0  # seconds in which a broker that is there says how it is
Ask = Callable[[dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Mapped:
    """What became of a job: rows in all, those with an error in place of an answer, those an earlier run had done."""

    rows: int
    failed: int
    before: int


async def map_rows(
    client: Client,
    ask: Ask,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    job: str,
    concurrency: int = 16,
    strict: bool = False,
    told: Callable[[int, int, int], object] = lambda done, failed, rows: None,
) -> Mapped:
    """Asks for each row of a .jsonl file, and writes the answers to another one, in the same order.

    A row counts as done when its answer is on the disk, in a journal beside the output; an interrupted job goes on
    behind it when it is called again. Rows that were under way then are asked again. Busy is waited out; a row whose
    worker is lost is asked again, until it is held to be the cause.

    Args:
        client: of the broker that `ask` asks.
        ask: gives the answer to a row, a document for JSON or a Reply; it sees to its own deadline.
        job: what is asked, in a word; a journal of another job is not gone on with.
        concurrency: rows under way.
        strict: an error of a row ends the job; else it is written in place of the answer, as `error` and `code`.
        told: called with rows done, those of them that failed, and rows in all.

    Raises:
        Refused: the files are not as they should be.
        RalmqError: the broker or the service is gone; or, with `strict`, of a row. What is done is kept.
    """
    rows = await asyncio.to_thread(Rows, Path(source).expanduser())
    with Journal(Path(target).expanduser(), rows, job) as journal:
        before = journal.done
        told(journal.done, journal.failed, rows.count)
        await _Job(client, ask, rows, journal, strict, told).run(concurrency)
        await _whole(journal.finish)
        return Mapped(rows.count, journal.failed, before)


class _Job:
    """One run: askers that take the next row each, and one who keeps what they bring."""

    def __init__(
        self,
        client: Client,
        ask: Ask,
        rows: Rows,
        journal: Journal,
        strict: bool,
        told: Callable[[int, int, int], object],
    ) -> None:
        self._client = client
        self._ask = ask
        self._rows = rows
        self._journal = journal
        self._strict = strict
        self._told = told

    async def run(self, concurrency: int) -> None:
        with contextlib.closing(iter(self._rows)) as rows:
            await self._run(((row, body) for row, body in rows if not self._journal.has(row)), concurrency)

    async def _run(self, waiting: Iterator[tuple[int, dict[str, Any]]], concurrency: int) -> None:
        self._answers: asyncio.Queue[tuple[int, Any, bool]] = asyncio.Queue(2 * concurrency)
        askers = [asyncio.create_task(self._work(waiting)) for _ in range(concurrency)]
        keeper = asyncio.create_task(self._keep())
        try:
            done, _ = await asyncio.wait([keeper, *askers], return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        except BaseException:
            await _end([keeper, *askers])
            self._journal.add(self._left())  # what was answered is kept, whatever has ended the job
            raise

    async def _work(self, waiting: Iterator[tuple[int, dict[str, Any]]]) -> None:
        for row, body in waiting:
            document, failed = await self._one(row, body)
            await self._answers.put((row, document, failed))

    async def _one(self, row: int, body: dict[str, Any]) -> tuple[Any, bool]:
        """The document of a row, and whether it is an error."""
        losses = Losses(lambda: self._client.status(deadline=LOOK))
        while True:
            try:
                try:
                    return _document(await self._ask(body)), False
                except WorkerLost as lost:
                    await losses.add(lost, "the workers of this row were")
            except Busy as busy:
                await asyncio.sleep(busy.retry_after * random.uniform(1.0, 1.1))
            except ELSEWHERE:
                raise
            except RalmqError as error:
                if isinstance(error, DeadlineExceeded):
                    await self._client.status(deadline=LOOK)  # raises where it is the broker that is away
                if self._strict:
                    raise type(error)(f"row {row + 1}: {error.message}", request_id=error.request_id) from None
                return {"error": error.message, "code": error.code}, True

    async def _keep(self) -> None:
        """Writes what has come meanwhile, as one; ends when all is written."""
        missing = self._rows.count - self._journal.done
        while missing:
            records = [await self._answers.get(), *self._left()]
            await _whole(self._journal.add, records)
            missing -= len(records)
            self._told(self._journal.done, self._journal.failed, self._rows.count)

    def _left(self) -> list[tuple[int, Any, bool]]:
        return [self._answers.get_nowait() for _ in range(self._answers.qsize())]


async def _whole(write: Callable[..., None], *arguments: Any) -> None:
    """Writes in a thread, to the end even where this is cancelled: the file is still this run's until then."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *arguments))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await writing
        raise


def _document(answer: Any) -> Any:
    """A reply as a document: its map, and its tensors as nested lists under `tensors` where there are any."""
    if not isinstance(answer, Reply):
        return answer
    tensors = [tensor.numpy().tolist() for tensor in answer.tensors]
    return {**answer.body, "tensors": tensors} if tensors else answer.body


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # the first one is told
