"""Documents into a token stream and the count of bytes it predicts. Knows a tokenizer, no model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..index.stream import TokenStream
from .sources import Document, SourceError

_DOCUMENTS_AT_ONCE = 64


class Tokenized(NamedTuple):
    """The stream, and how many UTF-8 bytes all tokens but the first of each document stand for, in all and of each."""

    stream: TokenStream
    scored_bytes: int
    document_bytes: tuple[int, ...]


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer, max_tokens: int | None = None) -> Tokenized:
    """The first `max_tokens` tokens (None: all) of `documents`, without special tokens; the last document may be cut.

    Raises SourceError where fewer than two tokens in one document come out, so that nothing could be predicted.
    """
    room = max_tokens if max_tokens is not None else 1 << 62
    pieces: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
    names: list[str] = []
    sizes: list[int] = []
    remaining = iter(documents)
    while room > 0 and (batch := list(islice(remaining, _DOCUMENTS_AT_ONCE))):
        encodings = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            ids = np.array(encoding.ids[:room], dtype=np.int32)
            if not len(ids):
                continue
            # From the end of the first token to the end of the last: a token's start may leave its leading space out.
            first, last = encoding.offsets[0][1], encoding.offsets[len(ids) - 1][1]
            sizes.append(len(document.text[first:last].encode()))
            pieces.append(ids)
            names.append(document.name)
            room -= len(ids)
    if not any(len(piece) > 1 for piece in pieces):
        raise SourceError("the sources hold no document of two tokens; name a longer text or raise --max-tokens")
    lengths = np.array([0, *(len(piece) for piece in pieces[:-1])], dtype=np.int64)
    return Tokenized(TokenStream(np.concatenate(pieces), tuple(names), np.cumsum(lengths)), sum(sizes), tuple(sizes))
