"""A trigram table: the plainest model of a text, the control that retrieval is held against. Knows token ids alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_VOCAB = 1 << 20  # (a * vocab + b) * vocab + c stays inside 63 bits


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    """How often each (history, next) pair was seen; everything sorted by key, so that a look-up is a binary search."""

    pairs: NDArray[np.int64]
    counts: NDArray[np.int64]
    histories: NDArray[np.int64]
    totals: NDArray[np.int64]
    kinds: NDArray[np.int64]
    vocab: int

    @classmethod
    def of(cls, history: NDArray[np.int64], following: NDArray[np.int64], vocab: int) -> _Counts:
        pairs, counts = np.unique(history * vocab + following, return_counts=True)
        histories, first, kinds = np.unique(pairs // vocab, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if len(counts) else counts
        return cls(pairs, counts, histories, totals, kinds, vocab)

    def smoothed(
        self, history: NDArray[np.int64], targets: NDArray[np.int64], lower: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(count + kinds * lower) / (total + kinds): Witten-Bell; an unseen history (or one below 0) gives `lower`."""
        total = _at(self.histories, self.totals, history)
        kinds = _at(self.histories, self.kinds, history)
        count = _at(self.pairs, self.counts, history * self.vocab + targets)
        seen = total + kinds
        p: NDArray[np.float64] = np.divide(count + kinds * lower, seen, out=lower.copy(), where=seen > 0)
        return p


def _at(keys: NDArray[np.int64], found: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """found[i] where keys[i] == wanted, else 0."""
    if not len(keys):
        return np.zeros(wanted.shape, np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, found[places], 0)


@dataclass(frozen=True, slots=True, eq=False)
class Trigram:
    """p(c | a, b), interpolated with p(c | b), p(c) and 1 / vocab after Witten and Bell (1991): nothing to tune."""

    vocab: int
    _three: _Counts
    _two: _Counts
    _one: _Counts

    @classmethod
    def fit(cls, tokens: NDArray[np.int32], vocab: int, starts: NDArray[np.int64] | None = None) -> Trigram:
        """Counts `tokens` [n], each from 0 to vocab - 1; no n-gram reaches across an offset in `starts`.

        Raises ValueError for a token outside the vocabulary or a vocabulary over 2^20.
        """
        if not 1 <= vocab <= _MAX_VOCAB:
            raise ValueError(f"vocab is {vocab}; give 1 to {_MAX_VOCAB}")
        ids = tokens.astype(np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= vocab):
            raise ValueError(f"tokens leave the vocabulary of {vocab}; fit with the tokenizer's own")
        document = np.zeros(len(ids), np.int64)
        if starts is not None:
            document = np.searchsorted(starts, np.arange(len(ids)), side="right")
        two, three = document[1:] == document[:-1], document[2:] == document[:-2]
        return cls(
            vocab,
            _Counts.of((ids[:-2] * vocab + ids[1:-1])[three], ids[2:][three], vocab),
            _Counts.of(ids[:-1][two], ids[1:][two], vocab),
            _Counts.of(np.zeros_like(ids), ids, vocab),
        )

    def probability(self, contexts: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """p of each target [n] behind its two tokens [n, 2] (the older first; below 0 = there is none)."""
        pair, wanted = contexts.astype(np.int64), targets.astype(np.int64)
        uniform = np.full(wanted.shape, 1.0 / self.vocab)
        one = self._one.smoothed(np.zeros_like(wanted), wanted, uniform)
        two = self._two.smoothed(np.where(pair[:, 1] < 0, -1, pair[:, 1]), wanted, one)
        both = np.where((pair < 0).any(axis=1), -1, pair[:, 0] * self.vocab + pair[:, 1])
        return self._three.smoothed(both, wanted, two)
