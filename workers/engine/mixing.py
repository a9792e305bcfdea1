"""Mixing the model's distribution with that of retrieved neighbours, as kNN-LM does (Khandelwal et al., 2020).

Plain numpy in float64; knows no index, no sequence.
"""

import numpy as np
from numpy.typing import NDArray

from .sample import Floats, Ids


def knn_distribution(
    distances: NDArray[np.floating], values: NDArray[np.integer], vocab: int, temperature: float = 1.0
) -> tuple[Ids, Floats]:
    """kNN-LM's p_knn: softmax(-distance / temperature) over k neighbours, summed per token.

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
