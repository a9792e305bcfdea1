"""Suffix counts against counting by hand, and what a request for them is answered."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from ralmq.workers.index.query import BadQuery
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.suffix import AHEAD, MAX_CONTEXTS, ORDER, NgramTable, Suffixes


def stream_of(count: int, kinds: int, documents: int, seed: int = 0) -> TokenStream:
    """Random tokens in documents of random lengths, empty ones among them."""
    random = np.random.default_rng([count, kinds, documents, seed])
    starts = np.sort(random.integers(0, count + 1, documents - 1)) if documents > 1 else np.empty(0, np.int64)
    starts = np.concatenate([[0], starts]).astype(np.int64)
    tokens = (random.zipf(1.6, count) % kinds).astype(np.int32)
    return TokenStream(tokens, tuple(f"{n}" for n in range(documents)), starts)


def counted(stream: TokenStream, suffix: list[int], ahead: int = 0) -> dict[int, int]:
    """By hand: what stands behind a suffix, within its document."""
    found: Counter[int] = Counter()
    for start, end in zip(stream.starts, stream.ends, strict=True):
        line = stream.tokens[start:end].tolist()
        for place in range(len(line) - len(suffix) - ahead):
            if line[place : place + len(suffix)] == suffix:
                found[line[place + len(suffix) + ahead]] += 1
    return dict(found)


def told(counts: tuple[np.ndarray, np.ndarray]) -> dict[int, int]:
    ids, times = counts
    assert ids.dtype == times.dtype == np.int32 and (np.diff(ids) > 0).all()
    return dict(zip(ids.tolist(), times.tolist(), strict=True))


@pytest.mark.parametrize(
    ("count", "kinds", "documents"), [(1, 1, 1), (2, 2, 2), (9, 1, 1), (60, 3, 4), (400, 4, 1), (400, 30, 25)]
)
@pytest.mark.parametrize("ahead", [0, 1, AHEAD])
def test_counts_are_those_of_counting(count: int, kinds: int, documents: int, ahead: int) -> None:
    stream = stream_of(count, kinds, documents)
    suffixes = Suffixes(stream)
    assert told(suffixes.unigrams()) == Counter(stream.tokens.tolist())
    random = np.random.default_rng(1)
    for size in range(1, ORDER):
        asked = [random.integers(0, kinds + 1, size).tolist() for _ in range(20)]
        places = random.integers(0, count, 20)
        asked += [stream.tokens[place : place + size].tolist() for place in places if place + size <= count]
        for suffix in asked:
            assert told(suffixes.behind(suffix, ahead)) == counted(stream, suffix, ahead)


def test_frequent_suffixes_are_counted_once_and_right() -> None:
    stream = TokenStream(np.tile(np.array([5, 5, 6], np.int32), 2000), ("a",), np.zeros(1, np.int64))
    suffixes = Suffixes(stream)
    for _ in range(2):
        assert told(suffixes.behind([5])) == {5: 2000, 6: 2000}
        assert told(suffixes.behind([5, 5])) == {6: 2000}
        assert told(suffixes.behind([6])) == {5: 1999}
        assert told(suffixes.behind([5], 1)) == {5: 1999, 6: 2000}


def test_an_answer_holds_every_level_of_every_row() -> None:
    stream = stream_of(300, 5, 6)
    table = NgramTable(stream, "this")
    contexts = np.array([[1, 2, 1], [-1, -1, 2], [3, -1, 1], [-1, -1, -1], [9, 9, 9], [0, 1, 0]], np.int32)
    body, arrays = table.answer({"ngram": 4, "ahead": 2}, [contexts])
    assert body == {"table": "this"} and [array.ndim for array in arrays] == [1] * 5
    offsets, ids, counts, *unigrams = arrays
    assert len(offsets) == 6 * 3 + 1 and told((unigrams[0], unigrams[1])) == Counter(stream.tokens.tolist())
    for row, context in enumerate(contexts.tolist()):
        for level, size in enumerate((3, 2, 1)):
            part = slice(offsets[3 * row + level], offsets[3 * row + level + 1])
            wanted = {} if min(context[-size:]) < 0 else counted(stream, context[-size:], 2)
            assert told((ids[part], counts[part])) == wanted
    assert len(table.answer({"ngram": 4, "known": "other"}, [contexts])[1]) == 5
    body, arrays = table.answer({"ngram": 4, "known": "this"}, [contexts])
    assert body == {"table": "this"} and len(arrays) == 3
    for order, rows in ((1, 3), (1, 0), (3, 0)):
        offsets, ids, counts = table.answer({"ngram": order, "known": "this"}, [np.zeros((rows, order - 1), np.int32)])[
            1
        ]
        assert offsets.tolist() == [0] and not len(ids) and not len(counts)


@pytest.mark.parametrize(
    ("body", "context", "said"),
    [
        ({"ngram": 0}, np.zeros((1, 2), np.int32), "ngram is 0; send a whole number from 1 to 8"),
        ({"ngram": ORDER + 1}, np.zeros((1, ORDER), np.int32), "ngram is 9"),
        ({"ngram": True}, np.zeros((1, 0), np.int32), "ngram is True"),
        ({"ngram": "3"}, np.zeros((1, 2), np.int32), "ngram is '3'"),
        ({"ngram": 3, "ahead": 8}, np.zeros((1, 2), np.int32), "ahead is 8; send a whole number from 0 to 7"),
        ({"ngram": 3, "ahead": -1}, np.zeros((1, 2), np.int32), "ahead is -1"),
        ({"ngram": 3, "k": 5}, np.zeros((1, 2), np.int32), "unknown field k; n-grams are asked with ngram"),
        ({"ngram": 3}, np.zeros((1, 3), np.int32), r"contexts int32 \[rows, 2\]"),
        ({"ngram": 3}, np.zeros((1, 2), np.int64), r"contexts int32 \[rows, 2\]"),
        ({"ngram": 3}, None, r"contexts int32 \[rows, 2\]"),
        ({"ngram": 3}, np.zeros((MAX_CONTEXTS + 1, 2), np.int32), "4097 contexts are too many"),
    ],
)
def test_what_is_refused(body: dict[str, Any], context: np.ndarray | None, said: str) -> None:
    table = NgramTable(stream_of(60, 3, 4), "this")
    with pytest.raises(BadQuery, match=said):
        table.answer(body, [] if context is None else [context])
    assert len(table.answer({"ngram": 2}, [np.zeros((1, 1), np.int32)])[1]) == 5, "it goes on"
