"""How often a request lost whoever served it, and when it is held to be the cause. Knows names, no transport."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from ..schema.errors import Poisoned, WorkerLost
from ..schema.limits import LOSSES

MOST: Final = 4 * LOSSES  # losses, whatever became of the workers


class Losses:
    """Losses without progress between them.

    A worker that is back under its name was cut off or stood still: the request did not end it, and that loss does not
    count. Nor does one that names no worker.

    Args:
        alive: names of the workers that the broker knows; asked only when the request would be given up.
    """

    def __init__(self, alive: Callable[[], Awaitable[set[str]]]) -> None:
        self._alive = alive
        self._lost: list[str] = []
        self.count = 0

    def clear(self) -> None:
        """There was progress."""
        self._lost, self.count = [], 0

    @property
    def suspect(self) -> bool:
        """One more and it is given up."""
        return len(self._lost) >= LOSSES - 1

    async def add(self, lost: WorkerLost, what: str) -> None:
        """Counts one.

        Args:
            what: those that were lost, for the message.

        Raises:
            Poisoned: enough of them died.
        """
        self.count += 1
        self._lost.append(lost.worker)
        if len(self._lost) >= LOSSES:
            alive = await self._alive()
            self._lost = [worker for worker in self._lost if worker and worker not in alive]
        if len(self._lost) >= LOSSES or self.count >= MOST:
            raise Poisoned(
                f"{what} lost {self.count} times in a row before a token came ({lost.message}): "
                "see the logs, and change the request before it is asked again",
                request_id=lost.request_id,
            ) from lost


def names_of(status: dict[str, Any]) -> set[str]:
    """The workers that a status lists."""
    return {worker["name"] for worker in status["workers"]}
