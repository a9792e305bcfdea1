"""From logits to token ids: probabilities, mixing with neighbours, and draws that depend on (seed, position) alone.

Plain numpy in float64; knows no model and no tensor library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

WORD = 0xFFFFFFFF
PREFIX = 256  # most probable tokens that are sorted at first; nearly every draw falls among them


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep all. ValueError outside the ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False  # also the log-probability of the chosen token, before temperature, top_k and top_p

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < inf:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (all) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; give more than 0 and at most 1")


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), 32-bit words."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same seed and position everywhere."""
    a, b, _, _ = philox((seed & WORD, seed >> 32 & WORD), (position & WORD, position >> 32 & WORD, 0, 0))
    return ((a >> 5) * 67108864 + (b >> 6)) / 9007199254740992


def probabilities(logits: Logits) -> Floats:
    """Softmax of the last dimension in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def choose(p: Floats, params: SamplingParams, position: int) -> int:
    """The token at `position` of a sequence, from p [vocab].

    Greedy takes the most probable, the lowest id among equals. Otherwise temperature, then top_k, then top_p (the
    fewest tokens that hold at least that share), and u = uniform(seed, position) against the cumulated probabilities
    of what is kept, in the order (p descending, id).
    """
    if params.temperature == 0.0 or params.top_k == 1:
        return int(p.argmax())
    weights = p
    if params.temperature != 1.0:
        with np.errstate(divide="ignore"):
            weights = np.log(p)
        weights -= weights.max()
        weights /= params.temperature
        np.exp(weights, out=weights)
    u = uniform(params.seed, position)
    if 0 < params.top_k < len(p):
        order = _largest(weights, params.top_k)[: params.top_k]
        total = float(weights[order].cumsum()[-1])
    else:
        total = float(weights.sum())
        order = _largest_holding(weights, total * (u if params.top_p == 1.0 else params.top_p))
    cumulated = weights[order].cumsum()
    if params.top_p < 1.0:
        kept = min(len(order), int(cumulated.searchsorted(params.top_p * total)) + 1)
        cumulated = cumulated[:kept]
        total = float(cumulated[-1])
    place = cumulated.searchsorted(u * total, side="right")
    # Rounding can lift u * total to the whole: then it is the last token that adds anything.
    return int(order[min(place, cumulated.searchsorted(cumulated[-1]))])


def _largest(weights: Floats, size: int) -> Ids:
    """At least `size` ids in the order (weight descending, id), nothing left out before the last of them."""
    if size >= len(weights):
        return np.argsort(-weights, kind="stable")
    threshold = np.partition(weights, len(weights) - size)[len(weights) - size]
    ids = np.flatnonzero(weights >= threshold)
    return ids[np.argsort(-weights[ids], kind="stable")]


def _largest_holding(weights: Floats, enough: float) -> Ids:
    """The first ids of that order, as many as weigh more than `enough` together, or all; rarely a full sort."""
    size = PREFIX
    while True:
        order = _largest(weights, size)
        if len(order) == len(weights) or float(weights[order].cumsum()[-1]) > enough:
            return order
        size *= 16


def sample_rows(
    logits: Logits, params: Sequence[SamplingParams], positions: Sequence[int]
) -> tuple[list[int], list[float | None]]:
    """One token for each row of logits [m, vocab], and its log-probability where the row's parameters ask for it.

    Greedy rows need no softmax and give what `choose` gives.
    """
    tokens = logits.argmax(axis=1)
    drawn = [i for i, row in enumerate(params) if row.temperature > 0.0]
    if drawn:
        for i, p in zip(drawn, probabilities(logits[drawn]), strict=True):
            tokens[i] = choose(p, params[i], positions[i])
    chosen: list[float | None] = [None] * len(params)
    asked = [i for i, row in enumerate(params) if row.logprobs]
    if asked:
        for i, value in zip(asked, log_probs_of(logits[asked], tokens[asked]), strict=True):
            chosen[i] = float(value)
    return [int(token) for token in tokens], chosen


def log_probs_of(logits: Logits, targets: Ids | NDArray[np.int32]) -> NDArray[np.float32]:
    """log p of targets [n] under the softmax of logits [n, vocab]."""
    result = np.empty(len(targets), dtype=np.float32)
    for start in range(0, len(targets), 64):  # a few rows at a time: a copy of all logits of a long text is large
        rows, wanted = logits[start : start + 64], targets[start : start + 64]
        top = rows.max(axis=1, keepdims=True)
        normalizer = np.log(np.exp(rows - top).sum(axis=1, dtype=np.float64))
        result[start : start + 64] = rows[np.arange(len(wanted)), wanted] - top[:, 0] - normalizer
    return result


def log_prob(p: Floats, token: int) -> float:
    """log p of one token of p [vocab]; -inf where p is 0."""
    return float(np.log(p[token])) if p[token] > 0.0 else -inf


def knn_distribution(
    distances: NDArray[np.floating], values: NDArray[np.integer], vocab: int, temperature: float = 1.0
) -> tuple[Ids, Floats]:
    """kNN-LM's p_knn (Khandelwal et al. 2020): softmax(-distance / temperature) over k neighbours, summed per token.

    distances [k], values [k] (the token that followed each neighbour; negative = no neighbour, left out) -> the token
    ids that occur, ascending, and their probabilities. Both are empty where there is no neighbour. ValueError for a
    token outside the vocabulary or a temperature that is not positive.
    """
    if not temperature > 0.0:
        raise ValueError(f"knn temperature is {temperature}; give more than 0")
    found = (values >= 0) & np.isfinite(distances)
    tokens = values[found].astype(np.int64)
    if tokens.size == 0:
        return tokens, np.empty(0)
    if int(tokens.max()) >= vocab:
        raise ValueError(
            f"neighbour's token {int(tokens.max())} is outside the vocabulary of {vocab}; rebuild the index"
        )
    scores = distances[found].astype(np.float64) / -temperature
    weights = np.exp(scores - scores.max())
    ids: Ids
    ids, place = np.unique(tokens, return_inverse=True)
    return ids, np.bincount(place, weights / weights.sum()).astype(np.float64)


def mix(p_lm: Floats, ids: Ids, probs: Floats, lam: float) -> Floats:
    """lam * p_knn + (1 - lam) * p_lm over [vocab]; p_lm itself where lam is 0 or there is no neighbour."""
    if lam == 0.0 or len(ids) == 0:
        return p_lm
    mixed = (1.0 - lam) * p_lm
    mixed[ids] += lam * probs
    return mixed
