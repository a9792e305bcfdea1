"""What an index answers, without a socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.workers.index.answer import answer
from ralmq.workers.index.store import BadQuery, OpenIndex, open_index
from ralmq.workers.index.stream import TokenStream

QUERIES = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def index(build: Callable[..., Path]) -> OpenIndex:
    return open_index(build())


def test_info(index: OpenIndex) -> None:
    body, arrays = answer(index, {"info": True}, [])
    assert arrays == []
    assert body == {
        "name": "docs",
        "d": 4,
        "ntotal": 17,
        "metric": "l2",
        "fingerprint": "abc",
        "model": "tiny",
        "tokens_per_payload": 8,
    }


def test_hits_and_what_follows_them(index: OpenIndex) -> None:
    body, (ids, distances, payloads) = answer(index, {"k": 5, "nprobe": 2}, [QUERIES])
    wanted_ids, wanted_distances = index.search(QUERIES, 5)
    assert body == {}
    assert ids.tolist() == wanted_ids.tolist() and distances.tolist() == wanted_distances.tolist()
    assert payloads.tolist() == index.following(ids).tolist()
    assert [array.tolist() for array in answer(index, {"k": 5, "following": False}, [QUERIES])[1]] == [
        ids.tolist(),
        distances.tolist(),
    ]
    assert answer(index, {}, [QUERIES])[1][0].shape == (3, 10)


def test_passages(index: OpenIndex) -> None:
    body, arrays = answer(index, {"k": 20, "passages": True, "following": False}, [QUERIES])
    ids, _, windows, splits, documents, starts = arrays
    assert windows.shape == (3, 20, 32) and windows.dtype == np.int32
    assert sorted(body["documents"]) == ["a.txt", "c.txt"]
    for place in np.ndindex(ids.shape):
        passage = index.passages(ids[place].reshape(1))[0]
        tokens = windows[place]
        if passage is None:
            assert (tokens == -1).all() and documents[place] == -1
            continue
        assert tokens[tokens >= 0].tolist() == passage.tokens.tolist()
        assert body["documents"][documents[place]] == passage.document
        assert (splits[place], starts[place]) == (passage.split, passage.start)
    assert (ids == -1).sum() == 9


@pytest.mark.parametrize(
    ("body", "arrays", "said"),
    [
        ({"K": 3}, [QUERIES], "unknown field K"),
        ({3: 3}, [QUERIES], "unknown field 3"),
        ({"passages": "yes"}, [QUERIES], "passages is 'yes'; send true or false"),
        ({"info": []}, [], "info is []"),
        ({}, [], "0 arrays came; send one"),
        ({}, [QUERIES, QUERIES], "2 arrays came"),
        ({"k": 0}, [QUERIES], "k is 0"),
        ({"k": "x"}, [QUERIES], "k is 'x'"),
        ({"nprobe": 0}, [QUERIES], "nprobe is 0"),
        ({}, [QUERIES[:, :3]], "wants [m, 4]"),
    ],
)
def test_requests_that_are_refused(index: OpenIndex, body: dict[Any, Any], arrays: list[np.ndarray], said: str) -> None:
    with pytest.raises(BadQuery) as caught:
        answer(index, body, arrays)
    assert said in str(caught.value)


def test_too_many_passages(build: Callable[..., Path]) -> None:
    stream = TokenStream(np.zeros(1200, np.int32), ("a",), np.array([0]))
    vectors = np.zeros((1199, 4), np.float32)
    index = open_index(build(vectors=vectors, stream=stream, entries=stream.entries()))
    with pytest.raises(BadQuery, match="passages of 1025 hits; ask for at most 1024"):
        answer(index, {"k": 205, "passages": True}, [np.zeros((5, 4), np.float32)])
    assert len(answer(index, {"k": 1024, "passages": True}, [np.zeros((1, 4), np.float32)])[1]) == 7
