"""Held-out bits per byte of a model, of kNN-LM over an index, and of their controls, measured over a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .knn_eval import bits_per_byte, knn_log_probability, mix
from .ngram import Trigram
from .score import IN_FLIGHT, Asker, Scored, score
from .sources import Document
from .tokenized import tokenize
from .writer import Progress, silent

_QUERIES_AT_ONCE = 256


class Hits(Protocol):
    """What a search answers: ids int64 [m, k], distances float32 [m, k], payloads int32 [m, k, 8]."""

    @property
    def ids(self) -> Any:
        """-1 = none."""
        ...

    @property
    def distances(self) -> Any:
        """Squared L2."""
        ...

    @property
    def payloads(self) -> Any:
        """The tokens that follow each hit, its value first."""
        ...


Search = Callable[[NDArray[np.float32]], Awaitable[Hits]]


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """A scored text and the bytes its targets stand for."""

    scored: Scored
    n_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The hits of each query: ids int64 [n, k], squared distances float32 [n, k], values int32 [n, k]; -1 = none."""

    ids: NDArray[np.int64]
    distances: NDArray[np.float32]
    values: NDArray[np.int32]

    def shuffled(self, seed: int = 0) -> Neighbours:
        """The control: every entry that was hit gets the value of another one, drawn once and kept over all queries."""
        found = self.ids >= 0
        ids, first = np.unique(self.ids[found], return_index=True)
        drawn = np.random.default_rng(seed).permutation(self.values[found][first])
        values = self.values.copy()
        values[found] = drawn[np.searchsorted(ids, self.ids[found])]
        return replace(self, values=values)


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits per byte: the model alone, mixed with its neighbours, mixed with neighbours of shuffled values."""

    model: float
    knn: float
    shuffled: float


async def score_held_out(
    client: Asker,
    *,
    model: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    in_flight: int = IN_FLIGHT,
    progress: Progress = silent,
) -> HeldOut:
    """Scores `documents` as `build_datastore` does. Raises SourceError, RalmqError."""
    stream, n_bytes = await asyncio.to_thread(tokenize, documents, tokenizer, max_tokens)
    return HeldOut(await score(client, model=model, stream=stream, in_flight=in_flight, progress=progress), n_bytes)


async def retrieve(held: HeldOut, search: Search, progress: Progress = silent) -> Neighbours:
    """The neighbours of every position of `held`; `search` fixes index, k and nprobe. Raises what `search` does."""
    queries = held.scored.hidden
    answers: list[Hits] = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        answers.append(await search(queries[start : start + _QUERIES_AT_ONCE]))
        progress("search", min(start + _QUERIES_AT_ONCE, len(queries)), len(queries))
    return Neighbours(
        np.concatenate([np.asarray(hits.ids, np.int64) for hits in answers]),
        np.concatenate([np.asarray(hits.distances, np.float32) for hits in answers]),
        np.concatenate([np.asarray(hits.payloads, np.int32)[..., 0] for hits in answers]),
    )


def model_bits(held: HeldOut) -> float:
    """Bits per byte of the model alone."""
    return bits_per_byte(held.scored.logp, held.n_bytes)


def knn_bits(held: HeldOut, neighbours: Neighbours, *, lam: float, temperature: float) -> float:
    """Bits per byte of lam p_knn + (1 - lam) p_lm."""
    mixed = knn_log_probability(
        held.scored.logp, neighbours.distances, neighbours.values, held.scored.targets, lam=lam, temperature=temperature
    )
    return bits_per_byte(mixed, held.n_bytes)


def trigram_bits(held: HeldOut, table: Trigram, *, lam: float) -> float:
    """Bits per byte of lam p_trigram + (1 - lam) p_lm; lam 1 is the table alone."""
    p_table = table.probability(held.scored.contexts, held.scored.targets)
    return bits_per_byte(np.log(mix(np.exp(held.scored.logp.astype(np.float64)), p_table, lam)), held.n_bytes)


async def evaluate_bits(
    held: HeldOut, search: Search, *, lam: float, temperature: float, seed: int = 0, progress: Progress = silent
) -> Bits:
    """Retrieves for every position of `held` and mixes in float64. Raises what `search` does, ValueError."""
    neighbours = await retrieve(held, search, progress)
    return Bits(
        model_bits(held),
        knn_bits(held, neighbours, lam=lam, temperature=temperature),
        knn_bits(held, neighbours.shuffled(seed), lam=lam, temperature=temperature),
    )
