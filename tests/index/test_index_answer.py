"""What an index answers, without a socket."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.schema.codec import decode, encode
from ralmq.schema.message import Final
from ralmq.workers.index.datastore import NAME_BYTES, TEXT_BYTES
from ralmq.workers.index.query import BadQuery, Params
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.search.answer import MAX_PAYLOADS, answer
from tokenizers import Tokenizer, decoders, models

KEYS = np.eye(4, dtype=np.float32)
QUERIES = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def index(build: Callable[..., Path]) -> OpenIndex:
    return open_index(build())


def test_info(index: OpenIndex) -> None:
    body, arrays = answer(index, {"info": True}, [])
    assert arrays == []
    assert body == {
        "name": "docs",
        "kind": "datastore",
        "d": 4,
        "ntotal": 17,
        "metric": "l2",
        "factory": "Flat",
        "nlist": 0,
        "fingerprint": "abc",
        "model": "tiny",
        "encoder": "",
        "tokens_per_payload": 8,
        "shards": 1,
        "shard": 0,
        "by": "rows",
        "version": index.manifest.version,
        "live": False,
    }


def test_hits_and_what_follows_them(index: OpenIndex) -> None:
    body, (ids, distances, payloads) = answer(index, {"k": 5, "nprobe": 2}, [QUERIES])
    wanted_ids, wanted_distances = index.search(QUERIES, Params(5))
    assert body == {"version": index.manifest.version}
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
        ({"text": ["a"]}, [], "searched with vectors, not text"),
        ({"payloads": "yes"}, [QUERIES], "payloads is 'yes'; send true or false"),
        ({"info": []}, [], "info is []"),
        ({}, [], "0 arrays came; send 1, the queries"),
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


def test_payloads_as_text(build: Callable[..., Path], words: Tokenizer) -> None:
    stream = TokenStream(np.arange(20, dtype=np.int32), ("a.txt", "b.txt", "c.txt"), np.array([0, 7, 8]))
    index = open_index(build(stream=stream, tokenizer=words.to_str()))
    body, (ids, _) = answer(index, {"k": 18, "payloads": True, "following": False}, [QUERIES])
    for row, found in zip(ids, body["payloads"], strict=True):
        for passage, payload in zip(index.passages(row), found, strict=True):
            if passage is None:
                assert payload == {}
                continue
            assert payload["context"] == " ".join(f"w{token}" for token in payload["tokens"][: passage.split])
            assert payload["continuation"] == "".join(f" w{token}" for token in payload["tokens"][passage.split :])
            assert payload["context"] and payload["continuation"]
            assert payload.keys() == {"document", "start", "split", "tokens", "context", "continuation"}
    assert sum(payload == {} for row in body["payloads"] for payload in row) == 3


def test_a_character_whose_tokens_are_split(build: Callable[..., Path]) -> None:
    """Bytes as tokens: no text before or behind the split holds the character."""
    bytewise = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, []))
    bytewise.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TokenStream(np.frombuffer("a\u4f60b".encode(), np.uint8).astype(np.int32), ("a",), np.array([0]))
    index = open_index(build(vectors=KEYS, stream=stream, entries=stream.entries(), tokenizer=bytewise.to_str()))
    found = [answer(index, {"k": 1, "payloads": True}, [key[None]])[0]["payloads"][0][0] for key in KEYS]
    lost = "\N{REPLACEMENT CHARACTER}"
    assert [(payload["context"], payload["continuation"]) for payload in found] == [
        ("a", "\u4f60b"),
        (lost * 2, lost * 3),  # the decoder's way: one for each byte that cannot be read with the others
        (lost * 3, lost * 2),
        ("a\u4f60", "b"),
    ]


def test_long_text_is_cut_where_it_is_farthest_from_the_neighbour(build: Callable[..., Path]) -> None:
    long = Tokenizer(models.WordLevel({f"{place:02}-" + "\u4f60" * 9: place for place in range(40)}, unk_token="x"))
    stream = TokenStream(np.arange(40, dtype=np.int32), ("\u4f60" * 50,), np.array([0]))
    vectors = np.zeros((39, 4), np.float32)
    vectors[20] = 1
    index = open_index(build(vectors=vectors, stream=stream, entries=stream.entries(), tokenizer=long.to_str()))
    payload = answer(index, {"k": 1, "payloads": True}, [vectors[20:21]])[0]["payloads"][0][0]
    assert payload["tokens"] == list(range(5, 37)) and payload["split"] == 16
    whole = long.decode(payload["tokens"][:16]), " " + long.decode(payload["tokens"][16:])
    assert whole[0].endswith(payload["context"]) and whole[1].startswith(payload["continuation"])
    assert payload["document"] == "\u4f60" * (NAME_BYTES // 3)
    for text in (payload["context"], payload["continuation"]):
        assert TEXT_BYTES - 3 < len(text.encode()) <= TEXT_BYTES


def test_payloads_fit_a_message(build: Callable[..., Path]) -> None:
    """The most there may be, with names, texts and token ids as long as they come, and one more."""
    stream = TokenStream(np.full(1200, 1 << 30, np.int32), ("x" * 3000,), np.array([0]))
    words = Tokenizer(models.WordLevel({"word" * 99: 1 << 30}, unk_token="x"))
    vectors = np.zeros((1199, 4), np.float32)
    index = open_index(build(vectors=vectors, stream=stream, entries=stream.entries(), tokenizer=words.to_str()))
    body, arrays = answer(index, {"k": MAX_PAYLOADS // 2, "payloads": True}, [np.zeros((2, 4), np.float32)])
    for row in body["payloads"]:
        for payload in row:
            payload.update(id=(1 << 63) - 1, distance=0.1)  # what is added where they go on with a token
    sent = encode(Final(body, arrays))
    received = decode(sent)[1]
    assert received.body == body
    last = body["payloads"][1][-1]
    assert [len(last[name]) for name in ("document", "context", "continuation")] == [NAME_BYTES, TEXT_BYTES, TEXT_BYTES]
    with pytest.raises(BadQuery, match="payloads of 1025 hits; ask for at most 1024"):
        answer(index, {"k": 205, "payloads": True}, [np.zeros((5, 4), np.float32)])
