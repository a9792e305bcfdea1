"""What the calls of the client return. Plain data."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..schema.tensor import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request, or one part of a stream: a map, and tensors (`.numpy()` gives arrays)."""

    body: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()


class Alternative(NamedTuple):
    """One of the most probable tokens of a position, and the natural logarithm of its probability."""

    id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; with echo, the prompt's come first.

    Attributes:
        text: what it adds to the text; may be empty while a character is incomplete or a stop string may begin.
        id: token id; -1 for text that was held back and is given at the end.
        position: absolute position in the sequence, the prompt included.
        logprob: natural logarithm of its probability, where asked for; None for the first token of an echoed prompt.
        passages: where retrieval was asked for: what was retrieved at this position, nearest first: what
            `Hits.payloads` holds, with the neighbour's `id` and `distance`.
        top_logprobs: where asked for: the most probable tokens of this position, best first.
        index: which of the n texts it belongs to.
    """

    text: str
    id: int
    position: int
    logprob: float | None = None
    passages: tuple[dict[str, Any], ...] = ()
    top_logprobs: tuple[Alternative, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class Hits:
    """Neighbours of each query.

    Attributes:
        ids: int64 [queries, k], -1 where the index holds fewer.
        distances: float32 [queries, k], in the index's metric.
        payloads: for each query, a map for each neighbour, empty where there is none: its `document`, the `start` of a
            window of `tokens` in it, of which the first `split` led to the neighbour; where the index holds a
            tokenizer, both parts as text, `context` and `continuation`. Else the fields that it was added with.
        shards: how many of the index's shards the answer holds, and of how many.
    """

    ids: Array
    distances: Array
    payloads: list[list[dict[str, Any]]]
    shards: tuple[int, int] = (1, 1)

    @property
    def coverage(self) -> float:
        """The share of the index that was searched: below 1 only where a partial answer was allowed."""
        return self.shards[0] / self.shards[1]
