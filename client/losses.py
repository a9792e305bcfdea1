"""How often a request lost whoever served it, and when it is held to be the cause. Knows names, no transport."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from ..schema.errors import Poisoned, RalmqError, WorkerLost
from ..schema.limits import LOSSES

MOST: Final = 4 * LOSSES  # losses, whatever became of the workers


class Losses:
    """Losses without progress between them; enough workers that died condemn the request.

    A worker that is back under its name was cut off or stood still: the request did not end it, and that loss does not
    count. Nor does one that names no worker; nor does any where nobody can tell who is back. While workers die that
    never had this request, something else ends them: it is asked again as a suspect, up to MOST losses.

    Args:
        status: asks for what `ralmq status` shows; only when the request would be given up.
    """

    def __init__(self, status: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._status = status
        self._lost: list[str] = []  # those that died, as far as known
        self._all: set[str] = set()
        self._since = 0.0
        self.count = 0

    def clear(self) -> None:
        """There was progress."""
        self._lost, self._all, self.count = [], set(), 0

    @property
    def suspect(self) -> bool:
        """One more and it is given up."""
        return len(self._lost) >= LOSSES - 1 or self.count >= MOST - 1

    async def add(self, lost: WorkerLost, what: str) -> None:
        """Counts one.

        Args:
            what: those that were lost, for the message.

        Raises:
            Poisoned: enough of them died.
        """
        if not self.count:
            self._since = time.monotonic()
        self.count += 1
        self._lost.append(lost.worker)
        self._all.add(lost.worker)
        if len(self._lost) >= LOSSES:
            await self._judge()
        if len(self._lost) >= LOSSES or self.count >= MOST:
            raise Poisoned(
                f"{what} lost {self.count} times in a row before a token came ({lost.message}): "
                "see the logs, and change the request before it is asked again",
                request_id=lost.request_id,
            ) from lost

    async def _judge(self) -> None:
        try:
            status = await self._status()
        except RalmqError:
            self._lost = []
            return
        alive = {worker["name"] for worker in status["workers"]}
        self._lost = [worker for worker in self._lost if worker and worker not in alive]
        seconds = time.monotonic() - self._since
        others = {entry["name"] for entry in status["lost"] if entry["age_s"] <= seconds} - self._all
        if others:
            del self._lost[: 1 - LOSSES]
