"""What the last stage asks an index, and what it hears. Knows the fields of `search:<index>`, no socket."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...schema.errors import WorkerFailed
from ...schema.tensor import Tensor
from ..engine.mixing import knn_distribution, mix
from ..hooks import LogitsHook, Tokens, Values
from ..params import Retrieval
from .batch import Key

FOLLOWING = 8  # tokens behind each neighbour

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Query:
    """One REQUEST for the rows of a micro-batch that ask the same index with the same parameters.

    Attributes:
        keys, positions: for each row, its sequence and the absolute position that it samples.
        vectors: float32 [rows, d].
        until: the latest deadline of the rows (time.monotonic()). With the earliest, a row whose time is up would take
            the others with it; it ends by itself.
    """

    index: str
    k: int
    nprobe: int | None
    passages: bool
    keys: list[Key] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    vectors: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))
    until: float = float("inf")

    def seconds(self) -> float:
        """What is left until then, at most the time that any request has."""
        return min(30.0, max(0.001, self.until - time.monotonic()))

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the REQUEST."""
        body: dict[str, Any] = {"k": self.k, "following": True, "payloads": self.passages}
        return body if self.nprobe is None else {**body, "nprobe": self.nprobe}


@dataclass(slots=True)
class Neighbours:
    """One row's answer: distances float32 [k], following tokens int32 [k, 8].

    `passages` (where asked for) are the index's payloads, each with the `id` and the `distance` of its neighbour.
    """

    distances: Array
    following: Array
    passages: list[dict[str, Any]]


class Mixing(LogitsHook):
    """kNN-LM's p = lambda p_knn + (1 - lambda) p_lm, as the logits hook that a row with neighbours goes through."""

    on = "probabilities"

    def __call__(self, tokens: Tokens, values: Values, params: dict[str, Any]) -> Values:
        """`params`: retrieval (Retrieval), metric, and found (Neighbours). ValueError for tokens of no vocabulary."""
        retrieval: Retrieval = params["retrieval"]
        found: Neighbours = params["found"]
        distances = found.distances if params["metric"] == "l2" else -found.distances
        behind = found.following[:, retrieval.staleness]
        ids, probs = knn_distribution(distances, behind, len(values), retrieval.knn_temperature)
        return mix(values, ids, probs, retrieval.knn_lambda)


def neighbours_of(query: Query, body: dict[str, Any], tensors: tuple[Tensor, ...]) -> list[Neighbours]:
    """The reply of an index, a row each.

    Raises:
        WorkerFailed: the reply does not fit the query.
    """
    rows = len(query.keys)
    arrays = [tensor.numpy() for tensor in tensors[:3]]
    shapes = [(rows, query.k), (rows, query.k), (rows, query.k, FOLLOWING)]
    if [array.shape for array in arrays] != shapes or [array.dtype.kind for array in arrays] != ["i", "f", "i"]:
        raise WorkerFailed(f"search:{query.index} answered in another shape: is another program serving its name?")
    ids, distances, following = arrays
    found = [Neighbours(distances[row], following[row], []) for row in range(rows)]
    if query.passages:
        payloads = body.get("payloads")
        if not isinstance(payloads, list) or [_length(line) for line in payloads] != [query.k] * rows:
            raise WorkerFailed(f"search:{query.index} answered without a payload for each neighbour")
        for row, line in enumerate(payloads):
            known = [place for place in range(query.k) if ids[row, place] >= 0]
            found[row].passages = [
                {**line[place], "id": int(ids[row, place]), "distance": float(distances[row, place])} for place in known
            ]
    return found


def _length(line: Any) -> int:
    """How many maps a list of payloads holds; -1 where it is something else."""
    return len(line) if isinstance(line, list) and all(isinstance(entry, dict) for entry in line) else -1
