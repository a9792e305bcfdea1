"""Passages of an index for a text that goes on. Knows the client's search, no tokenizer and no pipeline."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...client.client import Client
from ...client.results import Hits
from ...client.search import encoder_of
from .again import kept

RETRIES = 8  # resends to an index whose queue is full


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
        service = f"search:{self._index}"
        if self._encoder is None:
            self._encoder = await kept(service, self._encoder_of)
        query: Any = (await self._state(ids))[None] if self._encoder == self._own else text

        async def search(lost: bool) -> Hits:
            left = self._left()
            how: dict[str, Any] = {"deadline": left, "wait_service": left, "retries": RETRIES}
            return await self._client.search(self._index, query, k=self._k, nprobe=self._nprobe, **how)

        hits = await kept(service, search)
        lines = zip(hits.ids[0].tolist(), hits.distances[0].tolist(), hits.payloads[0], strict=True)
        return [{**payload, "id": number, "distance": distance} for number, distance, payload in lines if number >= 0]

    async def _encoder_of(self, lost: bool) -> str:
        left = self._left()
        how: dict[str, Any] = {"deadline": left, "wait_service": left if lost else self._wait, "retries": RETRIES}
        return encoder_of((await self._client.request(f"search:{self._index}", {"info": True}, **how)).body)
