"""What a service is asked again for where its worker was lost. Knows how often, not what."""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ...schema.errors import WorkerFailed, WorkerLost
from ...schema.limits import LOSSES

T = TypeVar("T")
log = logging.getLogger("ralmq.generator")


async def kept(service: str, ask: Callable[[bool], Awaitable[T]]) -> T:
    """What `ask` gives, told whether the service was lost before: then another of its workers, or one's return, is
    waited for.

    Raises:
        WorkerFailed: it was lost each time that it was asked.
    """
    losses = 0
    while True:
        try:
            return await ask(losses > 0)
        except WorkerLost as lost:
            losses += 1
            if losses >= LOSSES:
                raise WorkerFailed(f"{service} was lost {losses} times: {lost.message}") from lost
            log.warning("%s lost its worker: it is asked again", service)
