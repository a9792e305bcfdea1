"""The arithmetic of kNN-LM (Khandelwal et al., 2020) and of bits per byte, in float64. Knows no model, no index."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def knn_target_probability(
    distances: NDArray[np.float32], values: NDArray[np.int32], targets: NDArray[np.int32], temperature: float
) -> NDArray[np.float64]:
    """p_knn of each target [n]: the share of softmax(-distance / temperature) on neighbours whose value it is.

    `distances` [n, k], smaller is nearer (squared L2 as faiss gives it; negate inner products); `values` [n, k], below
    0 = no neighbour. A row without any neighbour gives 0. Raises ValueError for a temperature that is not above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"knn_temperature is {temperature}; give a number above 0")
    found = values >= 0
    scores = np.where(found, -distances.astype(np.float64) / temperature, -np.inf)
    best = scores.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(best), best, 0.0))
    total = weights.sum(axis=1)
    hit = np.where(values == targets[:, None], weights, 0.0).sum(axis=1)
    share: NDArray[np.float64] = np.divide(hit, total, out=np.zeros_like(hit), where=total > 0)
    return share


def mix(p_lm: NDArray[np.float64], p_other: NDArray[np.float64], lam: float) -> NDArray[np.float64]:
    """lam p_other + (1 - lam) p_lm. Raises ValueError for a lam outside 0 to 1."""
    if not 0 <= lam <= 1:
        raise ValueError(f"knn_lambda is {lam}; give a number from 0 to 1")
    return lam * p_other + (1 - lam) * p_lm


def knn_log_probability(
    logp_lm: NDArray[np.float32],
    distances: NDArray[np.float32],
    values: NDArray[np.int32],
    targets: NDArray[np.int32],
    *,
    lam: float,
    temperature: float,
) -> NDArray[np.float64]:
    """Natural log of the mixed probability of each target [n]; a row without neighbours keeps the model's own."""
    p_lm = np.exp(logp_lm.astype(np.float64))
    mixed = mix(p_lm, knn_target_probability(distances, values, targets, temperature), lam)
    with np.errstate(divide="ignore"):
        return np.where((values >= 0).any(axis=1), np.log(mixed), logp_lm.astype(np.float64))


def bits_per_byte(logp: NDArray[np.floating], n_bytes: int) -> float:
    """-sum(logp) / ln 2 / n_bytes, `logp` natural. Raises ValueError where there are no bytes."""
    if n_bytes < 1:
        raise ValueError("no bytes to spread the bits over; give a text of at least two tokens")
    return float(-logp.astype(np.float64).sum() / math.log(2) / n_bytes)
