"""Passages of an index for a text that goes on. Knows the client's search, no tokenizer and no pipeline."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from ...client.client import Client
from ...client.results import Hits
from ...client.search import encoder_of
from ...schema.errors import WorkerFailed, WorkerLost
from ...schema.limits import LOSSES

T = TypeVar("T")
RETRIES = 8  # resends to an index whose queue is full
log = logging.getLogger("ralmq.generator")


class Passages:
    """Searches one index on behalf of one text.

    Args:
        own: the service `embed:<model>` of whoever asks, which computes `state` itself: a request to that service would
            wait for the very texts that wait for it.
        state: vector float32 [d] of token ids.
        left: seconds until the text's deadline.
        wait: seconds to wait for an index that nobody offers, when it is asked first.
    """

    def __init__(
        self,
        client: Client,
        index: str,
        k: int,
        nprobe: int | None,
        own: str,
        state: Callable[[Sequence[int]], Awaitable[Any]],
        left: Callable[[], float],
        wait: float = 0.0,
    ) -> None:
        self._client = client
        self._index = index
        self._k = k
        self._nprobe = nprobe
        self._own = own
        self._state = state
        self._left = left
        self._wait = wait
        self._encoder: str | None = None

    async def __call__(self, ids: Sequence[int], text: str) -> list[dict[str, Any]]:
        """Payloads of the nearest passages, best first, each with its `id` and `distance`; for ids and their text.

        Raises:
            WorkerFailed: the index's server was lost each time that it was asked.
            RalmqError: as it answers.
        """
        if self._encoder is None:
            self._encoder = await self._kept(self._encoder_of)
        query: Any = (await self._state(ids))[None] if self._encoder == self._own else text
        hits = await self._kept(partial(self._search, query))
        lines = zip(hits.ids[0].tolist(), hits.distances[0].tolist(), hits.payloads[0], strict=True)
        return [{**payload, "id": number, "distance": distance} for number, distance, payload in lines if number >= 0]

    async def _encoder_of(self, wait: float) -> str:
        service, left = f"search:{self._index}", self._left()
        asked = self._client.request(service, {"info": True}, deadline=left, wait_service=wait, retries=RETRIES)
        return encoder_of((await asked).body)

    async def _search(self, query: Any, wait: float) -> Hits:
        return await self._client.search(
            self._index,
            query,
            k=self._k,
            nprobe=self._nprobe,
            deadline=self._left(),
            wait_service=wait,
            retries=RETRIES,
        )

    async def _kept(self, ask: Callable[[float], Awaitable[T]]) -> T:
        """What `ask` gives, told how long the index may be away: where it is lost, its return is waited for."""
        losses = 0
        while True:
            try:
                return await ask(self._left() if losses or self._encoder is not None else self._wait)
            except WorkerLost as lost:
                losses += 1
                if losses >= LOSSES:
                    raise WorkerFailed(f"search:{self._index} was lost {losses} times: {lost.message}") from lost
                log.warning("search:%s lost its server: it is asked again", self._index)
