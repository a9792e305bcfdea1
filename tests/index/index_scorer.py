"""A stand-in for a model that answers `score` as a stage does."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np


class Array:
    """A tensor as a client hands it out."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def numpy(self) -> np.ndarray:
        return self.values


class Part:
    def __init__(self, body: dict[str, Any], tensors: tuple[np.ndarray, ...] = ()) -> None:
        self.body = body
        self.tensors = [Array(tensor) for tensor in tensors]


class Scorer:
    """Answers `score` as a stage does. The key of a position is (token, the one before it or -1, context it had, 0)."""

    def __init__(self, context: int = 16, vocab: int = 50, chunk: int = 5) -> None:
        self.context, self.vocab, self.chunk = context, vocab, chunk
        self.fingerprint = "f" * 16
        self.asked: list[np.ndarray] = []
        self.now = self.most = 0
        self.spoil: Callable[[Part], Part | None] = lambda part: part

    async def stream(
        self, service: str, body: dict[str, Any], *, tensors: list[np.ndarray], deadline: float, retries: int
    ) -> AsyncIterator[Part]:
        assert (service, body) == ("lm:tiny", {"mode": "score"})
        ids = tensors[0]
        assert ids.dtype == np.int32 and 2 <= len(ids) <= self.context
        self.asked.append(ids)
        self.now += 1
        self.most = max(self.most, self.now)
        for part in self.answer(ids):
            spoiled = self.spoil(part)
            if spoiled is not None:
                yield spoiled
        self.now -= 1

    def answer(self, ids: np.ndarray) -> list[Part]:
        place = np.arange(len(ids) - 1)
        before = np.concatenate([[-1], ids[:-2]])
        hidden = np.stack([ids[:-1], before, place, np.zeros_like(place)], axis=1).astype(np.float32)
        logp = -(ids[1:] + 1).astype(np.float32) / 10
        parts = [
            Part(
                {"position": p, "count": len(logp[p : p + self.chunk])},
                (hidden[p:][: self.chunk], logp[p:][: self.chunk]),
            )
            for p in range(0, len(logp), self.chunk)
        ]
        summary = {"d": 4, "context": self.context, "vocab": self.vocab, "count": len(logp)}
        return [*parts, Part({"fingerprint": self.fingerprint, **summary})]
