"""A stand-in for a client whose model answers `score` as a stage does, and whose indexes answer searches."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
from ralmq.client.results import Reply
from ralmq.schema.tensor import tensor_of
from ralmq.workers.index.store import OpenIndex
from ralmq.workers.search.answer import answer

Spoil = Callable[[Reply], Reply | None]


def reply(body: dict[str, Any], *arrays: np.ndarray) -> Reply:
    return Reply(body, tuple(tensor_of(array) for array in arrays))


class Parts:
    """A stream of replies; the last one is its end."""

    def __init__(self, replies: list[Reply], spoil: Spoil, left: Callable[[], None]) -> None:
        self._replies: Iterator[Reply] = iter(replies[:-1])
        self._last = replies[-1]
        self._spoil, self._left = spoil, left
        self.final: Reply | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._left()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Reply:
        for part in self._replies:
            spoiled = self._spoil(part)
            if spoiled is not None:
                return spoiled
        self.final = self._spoil(self._last)
        raise StopAsyncIteration


class Scorer:
    """The key of a position is (token, the one before it or -1, context it had, 0); p is lower for higher tokens."""

    def __init__(self, context: int = 16, vocab: int = 50, chunk: int = 5) -> None:
        self.context, self.vocab, self.chunk = context, vocab, chunk
        self.fingerprint = "f" * 16
        self.indexes: dict[str, OpenIndex] = {}
        self.asked: list[np.ndarray] = []
        self.retries: list[int] = []
        self.searched: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.spoil: Spoil = lambda part: part

    def stream(
        self,
        service: str,
        body: dict[str, Any],
        *,
        tensors: list[np.ndarray],
        deadline: float,
        retries: int,
        wait_service: float,
    ) -> Parts:
        assert (service, body) == ("lm:tiny", {"mode": "score"}) and deadline > 0
        self.retries.append(retries)
        ids = tensors[0]
        assert ids.dtype == np.int32 and 2 <= len(ids) <= self.context
        self.asked.append(ids)
        self.now += 1
        self.most = max(self.most, self.now)
        return Parts(self.answer(ids), self.spoil, self.left)

    def left(self) -> None:
        self.now -= 1

    async def request(
        self, service: str, body: dict[str, Any], *, tensors: tuple[np.ndarray, ...] = (), retries: int = 0
    ) -> Reply:
        self.searched.append(body)
        answered, arrays = answer(self.indexes[service.removeprefix("search:")], body, tensors)
        return reply(answered, *arrays)

    def answer(self, ids: np.ndarray) -> list[Reply]:
        place = np.arange(len(ids) - 1)
        before = np.concatenate([[-1], ids[:-2]])
        hidden = np.stack([ids[:-1], before, place, np.zeros_like(place)], axis=1).astype(np.float32)
        logp = -(ids[1:] + 1).astype(np.float32) / 10
        parts = [
            reply(
                {"position": p, "count": len(logp[p:][: self.chunk])}, hidden[p:][: self.chunk], logp[p:][: self.chunk]
            )
            for p in range(0, len(logp), self.chunk)
        ]
        summary = {"d": 4, "context": self.context, "vocab": self.vocab, "count": len(logp)}
        return [*parts, reply({"fingerprint": self.fingerprint, **summary})]
