"""What the last stage has asked of indexes and not heard yet. Knows services, and who wants to know of an answer."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ...client.client import Client
from ...client.results import Reply
from ...schema.errors import Busy, DeadlineExceeded, NoService, RalmqError, WorkerFailed, WorkerLost
from ...schema.limits import LOSSES
from .last import Last, Outcome
from .neighbours import Asked

log = logging.getLogger("ralmq.stage")
AGAIN: Final = 0.1  # seconds, at least, until an index that is away is asked again
Work = Callable[[], Outcome]


class Searches:
    """Searches under way for one pipeline.

    Args:
        answered: takes what the compute thread is to do with an answer, or with a failure.
    """

    def __init__(self, answered: Callable[[Work], None]) -> None:
        self._answered = answered
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def begin(self, client: Client, last: Last, query: Asked) -> None:
        """Asks an index for parked rows."""
        task = asyncio.get_running_loop().create_task(self._search(client, last, query))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Nobody waits for any of them."""
        for task in self._tasks:
            task.cancel()

    async def _search(self, client: Client, last: Last, query: Asked) -> None:
        try:
            reply = await _found(client, last, query)
            work = partial(last.answered, query, query.answers(reply.body, reply.tensors))
        except RalmqError as error:
            work = partial(last.fail, query.keys, error)
        except Exception as error:  # an answer that nobody foresaw: its rows must not wait for their deadline
            log.exception("an answer of search:%s cannot be used", query.index)
            failure = WorkerFailed(f"an answer of search:{query.index} cannot be used: {type(error).__name__}: {error}")
            work = partial(last.fail, query.keys, failure)
        self._answered(work)


async def _found(client: Client, last: Last, query: Asked) -> Reply:
    """The index's answer. It was there when the sequences began: where it is away, its return is waited for.

    Raises:
        WorkerLost: its server was lost each time that it was asked.
        DeadlineExceeded, NoService, Busy: so it was until the last of the rows had no time left, or had ended.
    """
    losses = 0
    while True:
        try:
            return await _asked(client, query)
        except (WorkerLost, DeadlineExceeded, NoService, Busy) as error:
            losses += isinstance(error, WorkerLost)
            if losses >= LOSSES or query.left <= 0 or not last.knows(query.keys):
                raise
            log.warning("search:%s is asked again: %s", query.index, error.message)
            await asyncio.sleep(min(max(error.retry_after, AGAIN), max(0.0, query.left)))


async def _asked(client: Client, query: Asked) -> Reply:
    left = query.seconds()
    how: dict[str, Any] = {"deadline": left, "wait_service": left, "retries": 3, "priority": 6}
    if query.spread:
        return await client.search_reply(query.index, query.body, query.tensors, **how)
    return await client.request(f"search:{query.index}", query.body, tensors=query.tensors, **how)
