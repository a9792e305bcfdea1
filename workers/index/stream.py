"""Documents as one stream of token ids with a start for each. Knows no text, no tokenizer, no file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAD = -1
PAYLOAD = 8


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """Token ids int32 [n] of documents laid end to end; document i begins at offset `starts[i]` (int64 [documents]).

    Raises ValueError where starts do not begin at 0, fall, leave the stream, or are not one a name.
    """

    tokens: NDArray[np.int32]
    names: tuple[str, ...]
    starts: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.tokens.dtype != np.int32 or self.tokens.ndim != 1:
            raise ValueError("tokens must be int32 [n]")
        if self.starts.dtype != np.int64 or self.starts.shape != (len(self.names),) or not self.names:
            raise ValueError("starts must be int64, one for each of at least one name")
        if self.starts[0] != 0 or (np.diff(self.starts) < 0).any() or self.starts[-1] > len(self.tokens):
            raise ValueError("starts must begin at 0, never fall, and stay inside the stream")

    @property
    def ends(self) -> NDArray[np.int64]:
        """Offset behind the last token of each document, int64 [documents]."""
        return np.append(self.starts[1:], len(self.tokens)).astype(np.int64)

    def documents_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the document each offset lies in, int64 of the same shape."""
        return np.searchsorted(self.starts, offsets, side="right").astype(np.int64) - 1

    def entries(self) -> NDArray[np.int64]:
        """Offsets of every token that has a following one in its document: the keys of a datastore, int64 [entries]."""
        keep = np.ones(len(self.tokens), dtype=bool)
        keep[self.ends[self.ends > self.starts] - 1] = False
        return np.flatnonzero(keep).astype(np.int64)

    def following(self, offsets: NDArray[np.int64], width: int = PAYLOAD) -> NDArray[np.int32]:
        """The `width` tokens behind each offset, int32 [len(offsets), width]; PAD behind the document's end."""
        wanted = offsets[:, None] + np.arange(1, width + 1)
        inside = wanted < self.ends[self.documents_of(offsets)][:, None]
        return np.where(inside, self.tokens[np.where(inside, wanted, 0)], PAD).astype(np.int32)
