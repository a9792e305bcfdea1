"""What the last stage asks an index, and what it hears. Knows the fields of `search:<index>`, no socket."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...schema.errors import WorkerFailed
from ...schema.tensor import Tensor
from .leader import Key

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Query:
    """One REQUEST for the rows of a micro-batch that ask the same index with the same parameters.

    Attributes:
        keys, positions: for each row, its sequence and the absolute position that it samples.
        vectors: float32 [rows, d].
    """

    index: str
    k: int
    nprobe: int | None
    passages: bool
    keys: list[Key] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    vectors: Array = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the REQUEST."""
        body: dict[str, Any] = {"k": self.k, "following": True, "payloads": self.passages}
        return body if self.nprobe is None else {**body, "nprobe": self.nprobe}


@dataclass(slots=True)
class Neighbours:
    """One row's answer: distances float32 [k], following tokens int32 [k, 8].

    `passages` (where asked for) say where each neighbour stands: document, start, tokens, of which the first `split`
    are its context.
    """

    distances: Array
    following: Array
    passages: list[dict[str, Any]]


def neighbours_of(query: Query, body: dict[str, Any], tensors: tuple[Tensor, ...]) -> list[Neighbours]:
    """The reply of an index, a row each.

    Raises:
        WorkerFailed: the reply does not fit the query.
    """
    rows = len(query.keys)
    arrays = [tensor.numpy() for tensor in tensors]
    if len(arrays) < 3 or any(array.shape[:2] != (rows, query.k) for array in arrays[:3]):
        raise WorkerFailed(f"search:{query.index} answered in another shape: is another program serving its name?")
    payloads = body.get("payloads") or [[] for _ in range(rows)]
    if len(payloads) != rows:
        raise WorkerFailed(f"search:{query.index} answered {rows} queries with payloads of {len(payloads)}")
    found: list[Neighbours] = []
    for row in range(rows):
        ids, distances, following = (array[row] for array in arrays[:3])
        passages = [
            {"id": int(identity), "distance": float(distance), **payload}
            for identity, distance, payload in zip(ids, distances, payloads[row], strict=False)
            if identity >= 0
        ]
        found.append(Neighbours(distances, following, passages))
    return found
