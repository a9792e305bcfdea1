"""One text over `lm:<model>`, asked for again from where it was when a stage is lost. Knows tokens, no text."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from ...client.losses import Losses
from ...client.stream import Stream
from ...schema.errors import WorkerLost
from ..params import Task
from .context import Frame, Framing
from .options import wire


class Ask(Protocol):
    """Sends a request to the pipeline.

    Args:
        there: it has answered before, and may be away for a while.
        again: these tokens went to one that was lost.
        context: tokens that its reader does not count.
        states: what the encoder of an encoder-decoder made, float32 [n, d].
    """

    def __call__(
        self, body: dict[str, Any], ids: Sequence[int], *, there: bool, again: bool, context: int, states: Any = None
    ) -> Stream: ...


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
        status: asks for what `ralmq status` shows.
        context: what is put around the prompt; each stride of it is a request of its own.

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
        status: Callable[[], Awaitable[dict[str, Any]]],
        context: Framing | None = None,
    ) -> None:
        self.ended = ""
        self._ask = ask
        self._task = task
        self._prompt = prompt
        self._made = made
        self._suspects = suspects
        self._alone = False
        self._losses = Losses(status)
        self._context = context
        self._renewed = False  # the last attempt was a whole stride

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
        frame = await self._context.frame(made) if self._context is not None else Frame(0, self._task.max_tokens, True)
        if self._losses.suspect:
            await self._suspects.acquire()
            self._alone = True
        prompt = frame.around(self._prompt)
        changed: dict[str, Any] = {"max_tokens": frame.until - len(made), "context": frame.size}
        if made:
            changed["prompt"] = len(prompt)
        body, there = wire(self._task.model_copy(update=changed)), bool(made or self._losses.count)
        again, self._renewed = there and not self._renewed, False
        ids, states = [*prompt, *made], frame.states
        async with self._ask(body, ids, there=there, again=again, context=frame.size, states=states) as stream:
            async for part in stream:
                missing = part.body["position"] - len(self._prompt) - len(made)
                if missing < 0:
                    continue  # it is here already
                if missing:
                    raise WorkerLost("the pipeline left a token out")
                body = part.body
                if frame.passages and len(made) == frame.begin:
                    body = {**body, "passages": frame.passages}
                made.append(body["token"])
                if len(made) == frame.until and not frame.last and body.get("ended") == "length":
                    body = {name: value for name, value in body.items() if name != "ended"}  # of the stride alone
                self._losses.clear()
                self._cleared()
                self.ended = body.get("ended", "")
                yield body
        if not self.ended and len(made) < frame.until:
            raise WorkerLost("the pipeline ended the text without its last token")
        self._renewed = not self.ended and not frame.last
        if not self._renewed:
            self.ended = self.ended or "length"

    def _cleared(self) -> None:
        if self._alone:
            self._alone = False
            self._suspects.release()
