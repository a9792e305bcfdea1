"""Several searches in one call: equal parameters together, equal queries once. Knows no message and no service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...schema.errors import RequestCancelled
from ..index.query import MAX_HITS, Found, Params, Searchable

MAX_ROWS: Final = 65_536  # of one call
PIECE: Final = 256  # rows of the first of several calls
SOON: Final = 0.1  # seconds: a call that took less is followed by one of twice as many rows

GivenUp = Callable[[], bool]

Seen = Callable[[Params, NDArray[np.float32], Found], None]
"""Hears of each call without lists of the asker's own: its parameters, its different queries and what was found."""


@dataclass(slots=True, eq=False)
class Search:
    """One request's checked queries [m, d], perhaps with the asker's own lists [m, nprobe] and coarse distances."""

    params: Params
    queries: NDArray[np.float32]
    lists: NDArray[np.int64] | None = None
    coarse: NDArray[np.float32] | None = None


def search_together(
    index: Searchable,
    searches: Sequence[Search],
    *,
    threads: int = 1,
    seen: Seen | None = None,
    given_up: GivenUp = lambda: False,
) -> list[Found | Exception]:
    """What each search finds, or why it fails: the same as if each had been alone.

    Args:
        given_up: whether nobody waits for any of them any more; asked between calls.
    """
    groups: dict[Any, list[int]] = {}
    for place, search in enumerate(searches):
        width = -1 if search.lists is None else search.lists.shape[1]
        groups.setdefault((search.params, width), []).append(place)
    found: list[Found | Exception] = [RuntimeError("not searched")] * len(searches)
    for places in groups.values():
        for part in _parts(searches, places):
            answers = _answers(index, [searches[place] for place in part], threads, seen, given_up)
            for place, answer in zip(part, answers, strict=True):
                found[place] = answer
    return found


def _parts(searches: Sequence[Search], places: list[int]) -> list[list[int]]:
    """The searches of a group in calls of a bounded size."""
    most = min(MAX_ROWS, max(1, MAX_HITS // searches[places[0]].params.k))
    parts: list[list[int]] = [[]]
    rows = 0
    for place in places:
        count = len(searches[place].queries)
        if parts[-1] and rows + count > most:
            parts.append([])
            rows = 0
        parts[-1].append(place)
        rows += count
    return parts


def _answers(
    index: Searchable, searches: list[Search], threads: int, seen: Seen | None, given_up: GivenUp
) -> list[Found | Exception]:
    try:
        return list(_together(index, searches, threads, seen, given_up))
    except Exception as error:
        if len(searches) == 1:
            return [error]
    # one that fails must not fail the others
    return [answer for search in searches for answer in _answers(index, [search], threads, seen, given_up)]


def _together(
    index: Searchable, searches: list[Search], threads: int, seen: Seen | None, given_up: GivenUp
) -> list[Found]:
    first = searches[0]
    if len(searches) == 1:
        joined, inverse = first, None
    else:
        joined, inverse = _distinct(searches)
    found = _searched(index, joined, threads, given_up)
    if seen is not None and joined.lists is None:
        seen(joined.params, joined.queries, found)
    if len(searches) == 1:
        return [found]
    ids, distances = found if inverse is None else (found[0][inverse], found[1][inverse])
    answers, start = [], 0
    for search in searches:
        end = start + len(search.queries)
        answers.append((ids[start:end], distances[start:end]))
        start = end
    return answers


def _searched(index: Searchable, search: Search, threads: int, given_up: GivenUp) -> Found:
    """In calls that end soon, so that many rows hold nobody up whose asker has gone; they change no bit of an answer.

    Raises RequestCancelled.
    """
    found: list[Found] = []
    begin, size = 0, PIECE
    while not found or begin < len(search.queries):
        if given_up():
            raise RequestCancelled("nobody waits for the answer any more")
        begun, rows = time.monotonic(), slice(begin, begin + size)
        lists = None if search.lists is None else search.lists[rows]
        coarse = None if search.coarse is None else search.coarse[rows]
        found.append(index.search(search.queries[rows], search.params, lists, coarse, threads=threads))
        begin += size
        if time.monotonic() - begun < SOON:
            size = min(2 * size, MAX_ROWS)
    if len(found) == 1:
        return found[0]
    ids, distances = zip(*found, strict=True)
    return np.concatenate(ids), np.concatenate(distances)


def _distinct(searches: list[Search]) -> tuple[Search, NDArray[np.int64] | None]:
    """The different rows of all searches as one, and where each row is among them; None where all differ."""
    first = searches[0]
    queries = np.concatenate([search.queries for search in searches])
    lists = coarse = None
    parts = [queries]
    if first.lists is not None:
        lists = np.concatenate([search.lists for search in searches if search.lists is not None])
        coarse = np.concatenate([search.coarse for search in searches if search.coarse is not None])
        parts += [lists, coarse]
    keys = list(zip(*(_rows(part) for part in parts), strict=True))
    places: dict[Any, int] = {}
    inverse = np.fromiter((places.setdefault(key, len(places)) for key in keys), np.int64, len(keys))
    if len(places) == len(keys):
        return Search(first.params, queries, lists, coarse), None
    chosen = np.unique(inverse, return_index=True)[1]
    if lists is None or coarse is None:
        return Search(first.params, queries[chosen]), inverse
    return Search(first.params, queries[chosen], lists[chosen], coarse[chosen]), inverse


def _rows(array: NDArray[Any]) -> list[bytes]:
    raw, width = array.tobytes(), array.shape[1] * array.itemsize
    return [raw[start : start + width] for start in range(0, len(raw), width)]
