"""kNN-LM by its definition, in float64 numpy: all distances, no search, no pipeline."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ralmq.workers.index.store import open_index


class Offline:
    """The entries of an exact index, for a model of `vocab` tokens."""

    def __init__(self, path: Path, vocab: int, temperature: float) -> None:
        opened = open_index(path)
        count = opened.manifest.ntotal
        index: Any = opened.segment.index
        self.keys = index.reconstruct_n(0, count).astype(np.float64)
        self._following = opened.following(np.arange(count))
        self._vocab, self._temperature = vocab, temperature

    def p(self, query: np.ndarray, k: int, which: int) -> np.ndarray:
        """p_knn [vocab] of the token `which` places behind the next, from the k entries nearest to a query [d]."""
        distances = ((self.keys - query) ** 2).sum(1)
        nearest = np.argsort(distances)[:k]
        weights = np.exp(-distances[nearest] / self._temperature)
        tokens = self._following[nearest, which]
        p = np.zeros(self._vocab)
        np.add.at(p, tokens[tokens >= 0], weights[tokens >= 0])
        return p / p.sum()

    def errors(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        log_p: np.ndarray,
        queries: np.ndarray,
        retrieve: dict[str, Any],
    ) -> list[float]:
        """|p - reference| of each generated token, from log p of the model alone [tokens] and the queries sent [n, d].

        Raises AssertionError where the number of queries is not what interval and staleness ask for.
        """
        interval, staleness, weight = retrieve["interval"], retrieve["staleness"], retrieve["knn_lambda"]
        errors: list[float] = []
        used = 0
        for place, (token, logprob, alone) in enumerate(zip(tokens, logprobs, log_p, strict=True)):
            p = math.exp(alone)
            if place >= staleness and not (place - staleness) % interval:
                p = weight * self.p(queries[used], retrieve["k"], staleness)[token] + (1 - weight) * p
                used += 1
            assert logprob is not None
            errors.append(abs(math.exp(logprob) - p))
        assert used == len(queries)
        return errors
