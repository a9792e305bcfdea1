"""What a live index must hold, kept in a dictionary, and the brute-force search of it. Knows no log, no segment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from ralmq.workers.live import merging, segments
from ralmq.workers.live.live import LiveIndex
from ralmq.workers.live.opening import create_live, open_live

D = 16
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT, "cosine": faiss.METRIC_INNER_PRODUCT}


def small(monkeypatch: Any) -> None:
    """Few rows are merged, so that merging has work with small arrays."""
    for module, name, value in (
        (merging, "SMALL", 256),
        (merging, "MANY", 3),
        (merging, "_DEAD_LEAST", 16),
        (merging, "_CODES", 16),
        (segments, "RECENT", 32),
    ):
        monkeypatch.setattr(module, name, value)


def made(path: Path, factory: str = "Flat", metric: str = "l2") -> LiveIndex:
    create_live(path, name="docs", dimension=D, metric=metric, factory=factory)
    return open_live(path)


def vectors(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)


@dataclass
class Truth:
    """Vectors by id."""

    metric: str = "l2"
    known: dict[int, Any] = field(default_factory=dict)

    def put(self, ids: Any, given: Any) -> None:
        self.known.update(zip(ids.tolist(), given, strict=True))

    def drop(self, ids: Any) -> int:
        return sum(self.known.pop(number, None) is not None for number in np.unique(ids).tolist())

    def nearest(self, queries: Any, k: int) -> tuple[Any, Any]:
        """Ids and distances [m, k] by (distance, id), of all that is known."""
        ids = np.array(sorted(self.known), np.int64)
        stored = np.stack([self.known[number] for number in ids.tolist()])
        if self.metric == "cosine":
            stored, queries = stored.copy(), queries.copy()
            faiss.normalize_L2(stored)
            faiss.normalize_L2(queries)
        index = faiss.IndexFlat(D, METRICS[self.metric])
        index.add(stored)
        distances, rows = index.search(queries, len(ids))
        found = ids[rows]
        keys = distances if self.metric == "l2" else -distances
        order = np.lexsort((found, keys), axis=1)[:, :k]
        return np.take_along_axis(found, order, 1), np.take_along_axis(distances, order, 1)

    def distances(self, queries: Any, ids: Any) -> Any:
        """Of each query to the vectors of its ids [m, k]."""
        chosen = np.stack([[self.known[number] for number in row] for row in ids.tolist()])
        if self.metric == "l2":
            return ((chosen - queries[:, None]) ** 2).sum(-1)
        if self.metric == "cosine":
            chosen = chosen / np.linalg.norm(chosen, axis=-1, keepdims=True)
            queries = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
        return (chosen * queries[:, None]).sum(-1)
