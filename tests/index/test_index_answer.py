"""What an index answers, without a socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.schema.codec import decode, encode
from ralmq.schema.message import Final
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


def test_payloads(index: OpenIndex) -> None:
    body, (ids, _) = answer(index, {"k": 20, "payloads": True, "following": False}, [QUERIES])
    assert [len(row) for row in body["payloads"]] == [20, 20, 20]
    for row, found in zip(ids, body["payloads"], strict=True):
        for passage, payload in zip(index.passages(row), found, strict=True):
            if passage is None:
                assert payload == {}
                continue
            assert payload == {
                "document": passage.document,
                "start": passage.start,
                "split": passage.split,
                "tokens": passage.tokens.tolist(),
            }
    assert sum(payload == {} for row in body["payloads"] for payload in row) == (ids == -1).sum() == 9


@pytest.mark.parametrize(
    ("body", "arrays", "said"),
    [
        ({"K": 3}, [QUERIES], "unknown field K"),
        ({3: 3}, [QUERIES], "unknown field 3"),
        ({"payloads": "yes"}, [QUERIES], "payloads is 'yes'; send true or false"),
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


def test_payloads_fit_a_message(build: Callable[..., Path]) -> None:
    """The most there may be, with names and token ids as long as they come, and one more."""
    stream = TokenStream(np.full(1200, 1 << 30, np.int32), ("x" * 3000,), np.array([0]))
    index = open_index(build(vectors=np.zeros((1199, 4), np.float32), stream=stream, entries=stream.entries()))
    body, arrays = answer(index, {"k": 1024, "payloads": True}, [np.zeros((2, 4), np.float32)])
    sent = encode(Final(body, arrays))
    received = decode(sent)[1]
    assert received.body == body and received.body["payloads"][1][1023]["document"] == "x" * 128
    with pytest.raises(BadQuery, match="payloads of 2049 hits; ask for at most 2048"):
        answer(index, {"k": 683, "payloads": True}, [np.zeros((3, 4), np.float32)])
