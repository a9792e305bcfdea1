"""What the entries of a datastore stand for: the tokens that follow them, the passages around them. Knows no vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .stream import PAD, TokenStream
from .suffix import NgramTable

CONTEXT: Final = 16  # tokens of a passage before an entry, and behind it
NAME_BYTES: Final = 128
TEXT_BYTES: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """Tokens around one entry: int32 [n], the first `split` of them its context, the others what follows in `document`.

    `start` is the offset of the first of them in that document.
    """

    document: str
    start: int
    split: int
    tokens: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Datastore:
    """Rows of one directory: following tokens int32 [n, 8], offsets int64 [n] in the token stream, its tokenizer, its
    n-grams."""

    following: NDArray[np.int32]
    entries: NDArray[np.int64]
    stream: TokenStream
    tokenizer: Tokenizer | None
    ngrams: NgramTable

    def behind(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tokens behind each row, int32 [*rows.shape, 8]: its value first; -1 behind a document or for row -1."""
        if not len(self.following):
            return np.full((*rows.shape, self.following.shape[1]), PAD, np.int32)
        found = self.following[np.maximum(rows, 0)]
        return np.where((rows < 0)[..., None], np.int32(PAD), found).astype(np.int32)

    def passages(self, rows: NDArray[np.int64], before: int, after: int) -> list[Passage | None]:
        """The tokens around each row of [n]: `before` up to it and `after` behind at most; None for row -1."""
        found: list[Passage | None] = [None] * len(rows)
        known = np.flatnonzero(rows >= 0)
        offsets = self.entries[rows[known]]
        numbers = self.stream.documents_of(offsets)
        ends = self.stream.ends
        for place, offset, number in zip(known.tolist(), offsets.tolist(), numbers.tolist(), strict=True):
            start = int(self.stream.starts[number])
            first = max(start, offset + 1 - before)
            last = min(int(ends[number]), offset + 1 + after)
            tokens = self.stream.tokens[first:last]
            found[place] = Passage(self.stream.names[number], first - start, offset + 1 - first, tokens)
        return found

    def maps(self, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The passage around each row of [n] as it travels; {} for row -1."""
        return [_map(passage, self.tokenizer) for passage in self.passages(rows, CONTEXT, CONTEXT)]


def _map(passage: Passage | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if passage is None:
        return {}
    tokens = passage.tokens.tolist()
    found = {
        "document": _cut(passage.document, slice(-NAME_BYTES, None)),
        "start": passage.start,
        "split": passage.split,
        "tokens": tokens,
    }
    if tokenizer is not None:
        context, continuation = _texts(tokens, passage.split, tokenizer)
        found["context"] = _cut(context, slice(-TEXT_BYTES, None))
        found["continuation"] = _cut(continuation, slice(TEXT_BYTES))
    return found


def _texts(tokens: list[int], split: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """Both parts; joined they are the window's text, unless the split falls inside a character.

    Decoded alone, the second part of many tokenizers would lose the space it begins with.
    """
    context, whole = tokenizer.decode(tokens[:split]), tokenizer.decode(tokens)
    if whole.startswith(context):
        return context, whole[len(context) :]
    return context, tokenizer.decode(tokens[split:])


def _cut(text: str, kept: slice) -> str:
    """Those bytes of the text as UTF-8, without a character that the cut splits."""
    return text.encode(errors="replace")[kept].decode(errors="ignore")
