"""Asks the mode `score` of a model for the hidden state and log-probability of every token of a stream.

Knows the shape of that conversation; no torch, no faiss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...client.client import Client
from ...client.results import Reply
from ...schema.errors import Refused, WorkerFailed
from ..index.progress import Progress, silent
from ..index.stream import TokenStream
from .flight import several_at_once
from .windows import Window, windows

MAX_WINDOW = 1024
IN_FLIGHT = 4
_DEADLINE = 120.0  # seconds for one window
_LOADING = 30.0  # seconds that stages have to be there
_RESENDS = 8  # of one window, after Busy


class ScoreError(WorkerFailed):
    """An answer to `score` that does not fit the question: another shape, a lost or doubled position, another model."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model says of itself at the end of each score: hidden size d, longest context, vocabulary, fingerprint."""

    fingerprint: str
    d: int
    context: int
    vocab: int


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One row for each entry of `stream`: offset int64 [n], key float32 [n, d], natural log p of the next token [n]."""

    info: ModelInfo
    stream: TokenStream
    entries: NDArray[np.int64]
    hidden: NDArray[np.float32]
    logp: NDArray[np.float32]

    @property
    def targets(self) -> NDArray[np.int32]:
        """The token behind each entry, int32 [n]."""
        return self.stream.tokens[self.entries + 1]

    @property
    def contexts(self) -> NDArray[np.int32]:
        """The two tokens each target follows, the older first, int32 [n, 2]; -1 before a document's beginning."""
        older = self.entries - 1
        inside = older >= self.stream.starts[self.stream.documents_of(self.entries)]
        before = np.where(inside, self.stream.tokens[np.maximum(older, 0)], -1)
        return np.stack([before, self.stream.tokens[self.entries]], axis=1).astype(np.int32)


async def describe(client: Client, model: str) -> ModelInfo:
    """What the service `lm:<model>` says of itself, by the smallest score there is; stages that load are waited for.

    Raises RalmqError.
    """
    return (await _ask(client, model, np.zeros(2, np.int32), _LOADING)).info


async def score(
    client: Client,
    *,
    model: str,
    stream: TokenStream,
    overlap: int | None = None,
    in_flight: int = IN_FLIGHT,
    progress: Progress = silent,
) -> Scored:
    """Scores every entry of `stream` once, in windows of the model's context (at most 1024 tokens), a few at a time.

    `overlap` (default a quarter of a window) is the least context a token has, but for a document's first ones. Raises
    Refused for tokens outside the model's vocabulary, ScoreError for an answer that does not fit, any RalmqError.
    """
    info = await describe(client, model)
    largest = int(stream.tokens.max(initial=0))
    if largest >= info.vocab:
        raise Refused(f"token {largest} is outside the {info.vocab} of {model}; use that model's own tokenizer.json")
    entries = stream.entries()
    hidden, logp = np.empty((len(entries), info.d), np.float32), np.empty(len(entries), np.float32)
    size = min(info.context, MAX_WINDOW)
    todo = windows(stream, size, size // 4 if overlap is None else overlap)
    done = 0

    async def ask(window: Window) -> None:
        nonlocal done
        answer = await _ask(client, model, stream.tokens[window.start : window.stop])
        if answer.info != info:
            raise ScoreError(f"lm:{model} became another model while it was asked; start again")
        row = int(np.searchsorted(entries, window.start + window.keep))
        hidden[row : row + window.count] = answer.hidden[window.keep :]
        logp[row : row + window.count] = answer.logp[window.keep :]
        done += window.count
        progress("score", done, len(entries))

    await several_at_once(in_flight, todo, ask)
    return Scored(info, stream, entries, hidden, logp)


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    info: ModelInfo
    hidden: NDArray[np.float32]
    logp: NDArray[np.float32]


async def _ask(client: Client, model: str, ids: NDArray[np.int32], wait: float = 0.0) -> _Answer:
    """One window: n + 1 ids out, n rows back in chunks that may come in any order but each position once."""
    count = len(ids) - 1
    chunks: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    async with client.stream(
        f"lm:{model}", {"mode": "score"}, tensors=[ids], deadline=_DEADLINE, retries=_RESENDS, wait_service=wait
    ) as parts:
        async for part in parts:
            position, rows = part.body.get("position"), _rows(part)
            if type(position) is not int or position in chunks:
                raise ScoreError(f"score sent position {position!r} twice, or it is no number")
            chunks[position] = rows
        info = _info(parts.final.body if parts.final else {})
    ordered = [chunks[position] for position in sorted(chunks)]
    reached = np.cumsum([0, *(len(logp) for _, logp in ordered)])
    if sorted(chunks) != reached[:-1].tolist() or reached[-1] != count:
        raise ScoreError(f"score of {count} tokens sent {reached[-1]} rows that do not cover them")
    if any(hidden.shape[1] != info.d for hidden, _ in ordered):
        raise ScoreError(f"score sent keys of another width than the {info.d} it says the model has")
    hidden, logp = (np.concatenate(list(arrays)) for arrays in zip(*ordered, strict=True))
    if not (np.isfinite(hidden).all() and np.isfinite(logp).all()):
        raise ScoreError("score sent numbers that are not finite; the model's weights may be damaged")
    return _Answer(info, hidden, logp)


def _rows(part: Reply) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hidden states [c, d] and log-probabilities [c] of one part, copied out of its frames."""
    if len(part.tensors) != 2:
        raise ScoreError(
            f"score sent {len(part.tensors)} tensors in a part; wanted hidden states and log-probabilities"
        )
    hidden, logp = (np.array(tensor.numpy()) for tensor in part.tensors)
    if hidden.dtype != np.float32 or logp.dtype != np.float32 or hidden.ndim != 2 or logp.shape != hidden.shape[:1]:
        raise ScoreError(f"score sent {hidden.dtype} {list(hidden.shape)}, {logp.dtype} {list(logp.shape)} in a part")
    return hidden, logp


def _info(body: Mapping[str, Any]) -> ModelInfo:
    fingerprint = body.get("fingerprint")
    found = [body.get(name) for name in ("d", "context", "vocab")]
    sizes = [size for size in found if type(size) is int and size > 0]
    if not isinstance(fingerprint, str) or len(sizes) != 3 or sizes[1] < 2:
        raise ScoreError(f"score ended with a summary that lacks fingerprint, d, context or vocab: {dict(body)!r}")
    return ModelInfo(fingerprint, *sizes)
