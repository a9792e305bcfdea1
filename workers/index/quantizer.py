"""The coarse quantizer of an inverted file: which lists a query looks into. Knows faiss; an asker may hold one, too."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

_LARGE = 1e16
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT, "cosine": faiss.METRIC_INNER_PRODUCT}


class Quantizer:
    """Centroids float32 [nlist, d], as the service gives them.

    Its lists and distances are the index's own bit for bit, whatever the number of queries of a call: searched with
    them an index answers as it does when it assigns lists itself.
    """

    def __init__(self, centroids: NDArray[np.float32], metric: str) -> None:
        self.metric = metric
        self._index = faiss.IndexFlat(centroids.shape[1], METRICS[metric])
        self._index.add(np.ascontiguousarray(centroids, np.float32))

    def assign(self, queries: NDArray[np.float32], nprobe: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest lists int64 [m, nprobe] of queries [m, d], and their coarse distances float32 [m, nprobe]."""
        return assigned(self._index, normalised(queries) if self.metric == "cosine" else queries, nprobe)

    def distances(self, queries: NDArray[np.float32], lists: NDArray[np.int64]) -> NDArray[np.float32]:
        """The coarse distances of lists [m, nprobe] that somebody else chose: as `assign` gives them for its own."""
        asked = np.ascontiguousarray(normalised(queries) if self.metric == "cosine" else queries)
        chosen, found = np.ascontiguousarray(lists), np.empty(lists.shape, np.float32)
        index: Any = self._index  # faiss's own annotations lack this method
        pointers = [faiss.swig_ptr(array) for array in (asked, found, chosen)]
        index.compute_distance_subset(len(asked), pointers[0], lists.shape[1], *pointers[1:])
        return found


def assigned(
    quantizer: faiss.Index, queries: NDArray[np.float32], nprobe: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What `Quantizer.assign` gives, from a faiss index of centroids and queries as they are compared."""
    coarse, lists = compared(quantizer, np.ascontiguousarray(queries), nprobe)
    return lists, coarse


def compared(
    index: faiss.Index, queries: NDArray[np.float32], k: int, params: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Distances and rows [m, k] of a flat index, to each query the same bits as if it were alone.

    From 128,000 numbers in one call on faiss has BLAS compute them, by sums of another order (and three times as fast).
    """
    most = max(1, (faiss.cvar.distance_compute_blas_threshold - 1) // queries.shape[1])
    found: list[tuple[NDArray[np.float32], NDArray[np.int64]]] = [
        index.search(queries[start : start + most], k, params=params) for start in range(0, len(queries) or 1, most)
    ]
    if len(found) == 1:
        return found[0]
    distances, rows = zip(*found, strict=True)
    return np.concatenate(distances), np.concatenate(rows)


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of [n, d] with rows of length 1; zero rows stay zero."""
    copy = np.array(vectors, np.float32, order="C")
    largest = np.abs(copy).max(axis=1, initial=0)
    odd = (largest > _LARGE) | ((largest < 1 / _LARGE) & (largest > 0))
    if odd.any():  # float32 has no room for their squares, so that they would become zeros or stay as they are
        copy[odd] /= largest[odd, None]
    faiss.normalize_L2(copy)
    return copy
