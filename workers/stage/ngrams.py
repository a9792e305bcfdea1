"""N-gram counts at the last stage: what it asks a datastore, and the distribution that follows. Knows no socket."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...schema.errors import WorkerFailed
from ...schema.tensor import Tensor
from ..hooks import Values
from ..params import Retrieval
from .neighbours import Asked

Ids = NDArray[np.int32]
Counts = tuple[Ids, Ids]  # token ids, and how often each occurs


@dataclass(frozen=True, slots=True)
class Unigrams:
    """How often each token of a datastore occurs; `table` names its token stream."""

    table: str
    ids: Ids
    counts: Ids


@dataclass(slots=True)
class Suffix:
    """One row's answer: what stands behind its last tokens, the most of them first, and the unigrams below all."""

    part: ClassVar[str] = "ngram"
    levels: list[Counts]
    unigrams: Unigrams

    @property
    def passages(self) -> list[dict[str, Any]]:
        """None: counts stand nowhere."""
        return []

    def p(self, vocab: int, retrieval: Retrieval, metric: str) -> Values:
        """p [vocab] of the next token after Witten and Bell (1991): (count + kinds p') / (total + kinds) at each level,
        p' being that of the level below it, at last 1 / vocab. A level without counts is that below it.

        Raises:
            ValueError: a token of no vocabulary.
        """
        p: Values = np.full(vocab, 1.0 / vocab)
        for ids, counts in ((self.unigrams.ids, self.unigrams.counts), *reversed(self.levels)):
            if not len(ids):
                continue
            if int(ids.min()) < 0 or int(ids.max()) >= vocab:
                raise ValueError(f"a token of the index is outside the vocabulary of {vocab}; rebuild the index")
            seen = int(counts.sum(dtype=np.int64)) + len(ids)
            p *= len(ids) / seen
            p[ids] += counts / seen
        return p

    def weight(self, retrieval: Retrieval) -> float:
        """Its share of the mixture."""
        return retrieval.ngram_lambda


@dataclass(slots=True)
class NgramQuery(Asked):
    """One REQUEST for the rows of a micro-batch that ask the same datastore for n-grams of the same length.

    Attributes:
        order: tokens of an n-gram.
        ahead: tokens between those that are known and the one that is counted (staleness).
        known: the unigrams that need not be sent again.
        contexts: the last order - 1 tokens of each row, -1 for none.
    """

    part: ClassVar[str] = "ngram"
    spread: ClassVar[bool] = False
    order: int = 3
    ahead: int = 0
    known: Unigrams | None = None
    contexts: list[Ids] = field(default_factory=list)

    @property
    def body(self) -> dict[str, Any]:
        """The fields of the REQUEST."""
        known = {} if self.known is None else {"known": self.known.table}
        return {"ngram": self.order, **({"ahead": self.ahead} if self.ahead else {}), **known}

    @property
    def tensors(self) -> list[Any]:
        """Its tensors."""
        return [np.stack(self.contexts)]

    def answers(self, body: dict[str, Any], tensors: tuple[Tensor, ...]) -> list[Suffix]:
        """The reply of the datastore, a row each.

        Raises:
            WorkerFailed: it does not fit the query.
        """
        said = WorkerFailed(f"search:{self.index} answered without n-grams: is another program serving its name?")
        arrays = [tensor.numpy() for tensor in tensors]
        levels, table = self.order - 1, body.get("table")
        known = self.known is not None and table == self.known.table
        if len(arrays) != (3 if known else 5) or not isinstance(table, str):
            raise said
        if any(array.ndim != 1 or array.dtype.kind != "i" for array in arrays):
            raise said
        offsets, ids, counts = arrays[:3]
        if (
            len(offsets) != len(self.keys) * levels + 1
            or int(offsets[0]) != 0
            or int(offsets[-1]) != len(ids)
            or (np.diff(offsets) < 0).any()
            or len(ids) != len(counts)
            or (not known and len(arrays[3]) != len(arrays[4]))
        ):
            raise said
        unigrams = self.known if known and self.known is not None else Unigrams(table, *_own(arrays[3:]))
        ids, counts = _own([ids, counts])
        parts = [(ids[begin:end], counts[begin:end]) for begin, end in pairwise(offsets)]
        return [Suffix(parts[row * levels : (row + 1) * levels], unigrams) for row in range(len(self.keys))]


def context_of(tokens: Ids, position: int, order: int) -> Ids:
    """The last order - 1 tokens before a position, -1 where there are none."""
    before = tokens[max(0, position - order + 1) : position]
    return np.concatenate([np.full(order - 1 - len(before), -1, np.int32), before]).astype(np.int32)


def _own(arrays: list[Any]) -> list[Ids]:
    """Copies: a view would keep the whole message."""
    return [np.array(array, np.int32) for array in arrays]
