"""Which tokens stand behind the last few of a text, and how often, counted in a token stream. Knows ids, no vector."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .query import BadQuery, Counted
from .stream import TokenStream

ORDER: Final = 8  # tokens of an n-gram at most
AHEAD: Final = 7  # tokens between a suffix and what is counted behind it, at most
MAX_CONTEXTS: Final = 4096  # of one request
MAX_COUNTS: Final = 1 << 24  # about how many ids one answer holds: 128 MiB with their counts
_FREQUENT: Final = 1024  # occurrences of a suffix whose counts are kept
_FIELDS: Final = ("ngram", "ahead", "known")

Counts = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids, ascending, and how often each occurs."""


class Suffixes:
    """The places of a stream in the order of the 8 tokens from there, so that what begins alike lies side by side.

    A suffix array (Manber and Myers 1993) cut at that depth, by doubling; nothing reaches into the next document. It
    takes 5 bytes a token, and while it is made about 40. Counting is safe from several threads at once.
    """

    def __init__(self, stream: TokenStream) -> None:
        self._tokens = stream.tokens
        places = np.arange(len(stream.tokens), dtype=np.int64)
        left = stream.ends[stream.documents_of(places)] - places if len(places) else places
        self._left = np.minimum(left, 255).astype(np.uint8)  # tokens from there to the document's end
        self._places = _sorted(stream.tokens, self._left)
        # The numbers of a memoryview come several times faster than an array's.
        self._read = self._tokens.data, self._left.data, self._places.data
        self._frequent = lru_cache(256)(self._count)

    def unigrams(self) -> Counts:
        """Of all tokens."""
        return self._frequent(0, len(self._places), 0)

    def behind(self, suffix: Sequence[int], ahead: int = 0) -> Counts:
        """Of the tokens behind this suffix (1 to 7 of them), `ahead` others left out between."""
        start, end = 0, len(self._places)
        places = self._read[2]
        for depth, token in enumerate(suffix):
            within = range(start, end)

            def key(place: int, depth: int = depth) -> int:
                return self._at(places[place], depth)

            first = bisect_left(within, token, key=key)
            start, end = start + first, start + bisect_right(within, token, lo=first, key=key)
        counted = self._frequent if end - start > _FREQUENT else self._count
        return counted(start, end, len(suffix) + ahead)

    def _at(self, place: int, depth: int) -> int:
        tokens, left, _ = self._read
        return tokens[place + depth] if depth < left[place] else -1

    def _count(self, start: int, end: int, offset: int) -> Counts:
        places = self._places[start:end]
        inside = places[self._left[places] > offset]
        ids, counts = np.unique(self._tokens[inside + offset], return_counts=True)
        return ids.astype(np.int32), counts.astype(np.int32)


def _sorted(tokens: NDArray[np.int32], left: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
    rank = np.asarray(tokens, np.int64) + 1  # 0: behind the end
    order = np.argsort(rank, kind="stable")
    size = 1
    while size < ORDER:
        behind = np.zeros(len(rank), np.int64)
        behind[:-size] = np.where(left[:-size] > size, rank[size:], 0)
        key = rank * (rank.max(initial=0) + 1) + behind
        order = np.argsort(key, kind="stable")
        changed = np.ones(len(key), np.int64)
        changed[1:] = np.diff(key[order]) != 0
        rank[order] = np.cumsum(changed)
        size *= 2
    return order.astype(np.int32 if len(order) < 1 << 31 else np.int64)


class NgramTable:
    """The n-grams of one stream, counted when they are first asked for: an index that nobody asks pays nothing.

    Args:
        name: differs from that of any other stream.
    """

    def __init__(self, stream: TokenStream, name: str) -> None:
        self._stream = stream
        self._name = name
        self._lock = threading.Lock()
        self._made: Suffixes | None = None

    @property
    def suffixes(self) -> Suffixes:
        with self._lock:
            if self._made is None:
                self._made = Suffixes(self._stream)
            return self._made

    def answer(self, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Counted:
        """The answer to {"ngram": n, "ahead": 0, "known": ""} with contexts int32 [rows, n - 1], -1 for no token.

        For each row the counts behind its last n - 1 tokens, then behind the last n - 2 ..., down to the last one: ids
        and counts int32 [all], in front of them offsets int64 [rows (n - 1) + 1] that say where each begins. A suffix
        that reaches over a -1, or occurs nowhere, has none. The body holds "table", the stream's name; where that is
        not what the asker says to know, ids and counts of all tokens follow, which back off from everything else.

        Raises BadQuery.
        """
        order, ahead = body.get("ngram"), body.get("ahead", 0)
        unknown = sorted(str(key) for key in body if key not in _FIELDS)
        if unknown:
            raise BadQuery(f"unknown field {unknown[0]}; n-grams are asked with {', '.join(_FIELDS)}")
        if type(order) is not int or not 1 <= order <= ORDER:
            raise BadQuery(f"ngram is {order!r}; send a whole number from 1 to {ORDER}")
        if type(ahead) is not int or not 0 <= ahead <= AHEAD:
            raise BadQuery(f"ahead is {ahead!r}; send a whole number from 0 to {AHEAD}")
        contexts: NDArray[Any] = arrays[0] if len(arrays) == 1 else np.empty(0)
        if contexts.dtype != np.int32 or contexts.ndim != 2 or contexts.shape[1] != order - 1:
            raise BadQuery(f"send one array, the contexts int32 [rows, {order - 1}]")
        if len(contexts) > MAX_CONTEXTS:
            raise BadQuery(f"{len(contexts)} contexts are too many; send at most {MAX_CONTEXTS} at once")
        suffixes = self.suffixes
        none = np.empty(0, np.int32)
        found: list[Counts] = []
        total = 0
        rows: list[list[int]] = contexts.tolist()
        for row in rows:
            for size in range(order - 1, 0, -1):
                suffix = row[-size:]
                found.append((none, none) if min(suffix) < 0 else suffixes.behind(suffix, ahead))
                total += len(found[-1][0])
            if total > MAX_COUNTS:
                raise BadQuery(f"over {MAX_COUNTS} tokens stand behind these {len(rows)} contexts; send fewer at once")
        offsets = np.cumsum([0, *(len(ids) for ids, _ in found)], dtype=np.int64)
        answer = [offsets, *(np.concatenate([none, *some]) for some in zip(*found, strict=True))]
        answer += [none, none] if not found else []
        if body.get("known") != self._name:
            answer += suffixes.unigrams()
        return {"table": self._name}, answer
