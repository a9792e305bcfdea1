"""Held-out bits per byte of a model, of kNN-LM over an index, and of their controls, measured over a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ...client.client import Client
from ...schema.errors import Refused, WorkerFailed
from ..index.progress import Progress, silent
from .knn_eval import bits_per_byte, knn_log_probability, mix
from .ngram import Trigram
from .score import IN_FLIGHT, Scored, score
from .sources import Document
from .tokenized import tokenize

_QUERIES_AT_ONCE = 256
_RESENDS = 8


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """A scored text and the bytes its targets stand for, in all and in each document."""

    scored: Scored
    n_bytes: int
    document_bytes: tuple[int, ...]


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
    client: Client,
    *,
    model: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    in_flight: int = IN_FLIGHT,
    progress: Progress = silent,
) -> HeldOut:
    """Scores `documents` as `build_datastore` does. Raises SourceError, RalmqError."""
    found = await asyncio.to_thread(tokenize, documents, tokenizer, max_tokens)
    scored = await score(client, model=model, stream=found.stream, in_flight=in_flight, progress=progress)
    return HeldOut(scored, found.scored_bytes, found.document_bytes)


async def retrieve(
    client: Client, index: str, held: HeldOut, *, k: int = 10, nprobe: int | None = None, progress: Progress = silent
) -> Neighbours:
    """The neighbours of every position of `held` in `search:<index>`. `progress` hears of the stage search.

    Raises Refused where the index was not made by the model that scored `held`, WorkerFailed for an answer that does
    not fit, any RalmqError.
    """
    service, queries = f"search:{index}", held.scored.hidden
    made_by = (await client.request(service, {"info": True}, retries=_RESENDS)).body.get("fingerprint")
    if made_by != held.scored.info.fingerprint:
        raise Refused(f"the index {index} was made by another model: build it with the one that is evaluated")
    body = {"k": k, "following": True} | ({} if nprobe is None else {"nprobe": nprobe})
    parts: list[Neighbours] = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        asked = queries[start : start + _QUERIES_AT_ONCE]
        reply = await client.request(service, body, tensors=[asked], retries=_RESENDS)
        if [tensor.shape[:2] for tensor in reply.tensors] != [(len(asked), k)] * 3:
            raise WorkerFailed(
                f"{service} answered other arrays than ids, distances and payloads of {len(asked)} x {k}"
            )
        ids, distances, payloads = (tensor.numpy() for tensor in reply.tensors)
        parts.append(Neighbours(ids, distances, payloads[..., 0]))
        progress("search", start + len(asked), len(queries))
    return Neighbours(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.distances for part in parts]),
        np.concatenate([part.values for part in parts]),
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
    client: Client,
    index: str,
    held: HeldOut,
    *,
    lam: float,
    temperature: float,
    k: int = 10,
    nprobe: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Bits:
    """Retrieves for every position of `held` and mixes in float64. Raises what `retrieve` does, ValueError."""
    neighbours = await retrieve(client, index, held, k=k, nprobe=nprobe, progress=progress)
    return Bits(
        model_bits(held),
        knn_bits(held, neighbours, lam=lam, temperature=temperature),
        knn_bits(held, neighbours.shuffled(seed), lam=lam, temperature=temperature),
    )
