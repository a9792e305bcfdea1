"""One text over `lm:<model>`, asked for again from where it was when a stage is lost. Knows tokens, no text."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from ...client.losses import Losses
from ...client.stream import Stream
from ...schema.errors import WorkerLost
from ..params import Task
from .options import wire


class Ask(Protocol):
    """Sends a request to the pipeline."""

    def __call__(self, body: dict[str, Any], ids: Sequence[int], *, again: bool) -> Stream: ...


class Replay:
    """The generator is the journal of its texts: it has all tokens, and token ids are all that is replayed.

    A text that lost its pipeline twice before it had a new token is suspected of having ended it: its last attempt runs
    alone among those of other suspects, so that an innocent one is not condemned with it.

    Args:
        ask: sends a request to the pipeline.
        task: as if nothing was made yet.
        prompt: its ids.
        made: ids that are there already; grows.
        suspects: held by the one suspect that runs.
        alive: names of the workers that the broker knows.

    Attributes:
        ended: "stop" or "length", once it has ended by itself.
    """

    def __init__(
        self,
        ask: Ask,
        task: Task,
        prompt: Sequence[int],
        made: list[int],
        suspects: asyncio.Lock,
        alive: Callable[[], Awaitable[set[str]]],
    ) -> None:
        self.ended = ""
        self._ask = ask
        self._task = task
        self._prompt = prompt
        self._made = made
        self._suspects = suspects
        self._alone = False
        self._losses = Losses(alive)

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """Bodies of the tokens, each position once, in order.

        Raises:
            Poisoned: the pipeline was lost each time, and no token came between.
            RalmqError: as the pipeline answers.
        """
        if len(self._made) >= self._task.max_tokens:
            self.ended = "length"
        try:
            while not self.ended:
                try:
                    async for body in self._attempt():
                        yield body
                except WorkerLost as lost:
                    self._cleared()
                    if not self.ended:
                        await self._losses.add(lost, "its stages were")
        finally:
            self._cleared()

    async def _attempt(self) -> AsyncGenerator[dict[str, Any], None]:
        made = self._made
        if self._losses.suspect:
            await self._suspects.acquire()
            self._alone = True
        task = self._task.model_copy(update={"max_tokens": self._task.max_tokens - len(made)})
        if made:
            task = task.model_copy(update={"prompt": len(self._prompt)})
        again = bool(made or self._losses.count)
        async with self._ask(wire(task), [*self._prompt, *made], again=again) as stream:
            async for part in stream:
                if part.body["position"] != len(self._prompt) + len(made):
                    continue  # it is here already
                made.append(part.body["token"])
                self._losses.clear()
                self._cleared()
                self.ended = part.body.get("ended", "")
                yield part.body
        self.ended = self.ended or "length"

    def _cleared(self) -> None:
        if self._alone:
            self._alone = False
            self._suspects.release()
