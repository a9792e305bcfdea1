"""From probabilities to token ids: parameters, the filters, and draws that depend on (seed, position) alone.

Plain numpy in float64; knows no model and no tensor library.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

WORD = 0xFFFFFFFF
MANTISSA = 46  # bits of a float64 that a bucket of weights leaves open: 64 buckets between a weight and its double
BUCKETS = 4096  # below the highest; all weights under 2**-64 of the largest share the last


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all.

    Attributes:
        logprobs: also the log-probability of the chosen token, before everything else here.
        top_logprobs: and of so many of the most probable ones.
        logit_bias: pairs of id and what is added to its logit.
        min_tokens: of output before an id that ends the text.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < inf:
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give 0 (all) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; give more than 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p is {self.min_p}; give 0 (all) to 1")
        if not 0.0 < self.repetition_penalty < inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; give more than 0 (1: none)")


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


def probabilities(logits: Logits | Floats) -> Floats:
    """Softmax of the last dimension in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def choose(p: Floats, params: SamplingParams, position: int) -> int:
    """The token at `position` of a sequence, from p [vocab].

    Greedy takes the most probable, the lowest id among equals. Otherwise temperature, then min_p (tokens of at least
    that share of the most probable one; Nguyen et al. 2024), then top_k, then top_p (the fewest tokens that hold at
    least that share of what is left), and u = uniform(seed, position) against the cumulated probabilities of what is
    kept, in the order (p descending, id).
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
    if params.min_p > 0.0:
        weights = np.where(weights >= params.min_p * weights.max(), weights, 0.0)
    u = uniform(params.seed, position)
    ids: Ids | None = None
    if 0 < params.top_k < len(p):
        ids = _largest(weights, params.top_k)
        weights = weights[ids]
    ranked = _Ranked(weights)
    total = ranked.total
    if params.top_p < 1.0:
        total = ranked.reached(params.top_p * total, "left")[1]
    token = ranked.reached(min(u * total, float(np.nextafter(total, 0.0))), "right")[0]  # u * total may round up
    return token if ids is None else int(ids[token])


def _largest(weights: Floats, size: int) -> Ids:
    """The first `size` ids in the order (weight descending, id)."""
    threshold = np.partition(weights, len(weights) - size)[len(weights) - size]
    ids = np.flatnonzero(weights >= threshold)
    return ids[np.argsort(-weights[ids], kind="stable")][:size]


class _Ranked:
    """Weights cumulated in the order (weight descending, id), without sorting more than a small part of them.

    A weight's first bits say which bucket it belongs to; only the bucket in which a share ends is sorted.
    """

    def __init__(self, weights: Floats) -> None:
        self._weights = weights
        keys = weights.view(np.int64) >> MANTISSA  # rises with the weight, since none is negative
        keys -= keys.max() - BUCKETS
        np.maximum(keys, 0, out=keys)
        self._keys = keys
        self._upto = np.bincount(keys, weights, BUCKETS + 1)[::-1].cumsum()
        self.total = float(self._upto[-1])

    def reached(self, share: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """The first id with which the cumulated weight is at least (left), or more than (right) a share; that weight.

        The last id that adds anything where rounding leaves none.
        """
        last = self._upto.searchsorted(self.total)
        bucket = int(min(self._upto.searchsorted(share, side), last))
        ids = np.flatnonzero(self._keys == BUCKETS - bucket)
        ids = ids[np.argsort(-self._weights[ids], kind="stable")]
        cumulated = self._weights[ids].cumsum()
        if bucket:
            cumulated += self._upto[bucket - 1]
        place = min(cumulated.searchsorted(share, side), cumulated.searchsorted(cumulated[-1]))
        return int(ids[place]), float(cumulated[place])
