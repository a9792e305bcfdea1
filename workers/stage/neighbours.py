"""What the last stage asks an index, what it hears, how it mixes. Knows the fields of `search:<index>`, no socket."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from ...schema.errors import WorkerFailed
from ...schema.tensor import Tensor
from ..engine.mixing import knn_distribution
from ..hooks import LogitsHook, Tokens, Values
from ..params import Retrieval
from .batch import Key

FOLLOWING = 8  # tokens behind each neighbour
ATTEMPT = 30.0  # seconds

Array = np.ndarray[Any, Any]


class Found(Protocol):
    """What one row hears of one part of its policy.

    Attributes:
        passages: for the reader.
    """

    part: ClassVar[str]

    @property
    def passages(self) -> list[dict[str, Any]]: ...

    def p(self, vocab: int, retrieval: Retrieval, metric: str) -> Values | None:
        """Its p of the next token, [vocab]; None where nothing was found. ValueError for a token of no vocabulary."""

    def weight(self, retrieval: Retrieval) -> float:
        """Its share of the mixture."""


@dataclass(slots=True)
class Asked:
    """One REQUEST for rows of a micro-batch that ask the same index with the same parameters.

    Attributes:
        spread: each shard of the index knows a part of the answer, not all of it.
        keys, positions: for each row, its sequence and the absolute position that it samples.
        until: the latest deadline of the rows (time.monotonic()). With the earliest, a row whose time is up would take
            the others with it; it ends by itself. Until then an index that is away is asked again and again.
    """

    part: ClassVar[str] = ""
    spread: ClassVar[bool] = True
    index: str
    keys: list[Key] = field(default_factory=list, kw_only=True)
    positions: list[int] = field(default_factory=list, kw_only=True)
    until: float = field(default=float("inf"), kw_only=True)

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.until - time.monotonic()

    def seconds(self) -> float:
        """What one attempt may take of it, at most the time that any request has."""
        return min(ATTEMPT, max(0.001, self.left))

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the REQUEST."""
        raise NotImplementedError

    @property
    def tensors(self) -> list[Any]:
        """Its tensors."""
        raise NotImplementedError

    def answers(self, body: dict[str, Any], tensors: tuple[Tensor, ...]) -> Sequence[Found]:
        """The reply, a row each.

        Raises:
            WorkerFailed: it does not fit.
        """
        raise NotImplementedError


@dataclass(slots=True)
class Query(Asked):
    """A search for neighbours; `vectors` are float32 [rows, d]."""

    part: ClassVar[str] = "knn"
    k: int
    nprobe: int | None
    passages: bool
    vectors: Array = field(default_factory=lambda: np.empty((0, 0), np.float32), kw_only=True)

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the REQUEST."""
        body: dict[str, Any] = {"k": self.k, "following": True, "payloads": self.passages}
        return body if self.nprobe is None else {**body, "nprobe": self.nprobe}

    @property
    def tensors(self) -> list[Any]:
        """Its tensors."""
        return [self.vectors]

    def answers(self, body: dict[str, Any], tensors: tuple[Tensor, ...]) -> "list[Neighbours]":
        """The reply, a row each.

        Raises:
            WorkerFailed: it does not fit.
        """
        return neighbours_of(self, body, tensors)


@dataclass(slots=True)
class Neighbours:
    """One row's answer: distances float32 [k], following tokens int32 [k, 8].

    `passages` (where asked for) are the index's payloads, each with the `id` and the `distance` of its neighbour.
    """

    part: ClassVar[str] = "knn"
    distances: Array
    following: Array
    passages: list[dict[str, Any]]

    def p(self, vocab: int, retrieval: Retrieval, metric: str) -> Values | None:
        """kNN-LM's p [vocab]; None without a neighbour. ValueError for a token of no vocabulary."""
        distances = self.distances if metric == "l2" else -self.distances
        behind = self.following[:, retrieval.staleness]
        ids, probs = knn_distribution(distances, behind, vocab, retrieval.knn_temperature)
        if not len(ids):
            return None
        p: Values = np.zeros(vocab)
        p[ids] = probs
        return p

    def weight(self, retrieval: Retrieval) -> float:
        """Its share of the mixture."""
        return retrieval.knn_lambda


class Mixing(LogitsHook):
    """p = sum of each part's weight x p, and the rest of the weight x p_lm: the hook of a row that has retrieved.

    With neighbours alone that is kNN-LM. A part that found nothing leaves its weight to the model.
    """

    on = "probabilities"

    def __call__(self, tokens: Tokens, values: Values, params: dict[str, Any]) -> Values:
        """`params`: retrieval (Retrieval), metric, and found (of each part). ValueError for tokens of no vocabulary."""
        retrieval: Retrieval = params["retrieval"]
        parts = [(part.weight(retrieval), part.p(len(values), retrieval, params["metric"])) for part in params["found"]]
        shares = [(weight, p) for weight, p in parts if weight and p is not None]
        if not shares:
            return values
        mixed: Values = (1.0 - sum(weight for weight, _ in shares)) * values
        for weight, p in shares:
            mixed += weight * p
        return mixed


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
