"""What must not grow or stall: filters that are kept, counts of one answer, searches that nobody waits for."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import cluster
from ralmq.schema.errors import DeadlineExceeded, Refused, RequestCancelled
from ralmq.workers.base import Request
from ralmq.workers.index import fields, suffix
from ralmq.workers.index.fields import tokens_of
from ralmq.workers.index.filter import parse
from ralmq.workers.index.quantizer import normalised
from ralmq.workers.index.query import BadQuery, Params
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.suffix import NgramTable
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.live.opening import create_live, open_live
from ralmq.workers.search.answer import answer
from ralmq.workers.search.batch import PIECE, Search, search_together
from ralmq.workers.search.worker import Index
from ralmq.workers.texts.answer import answer_text
from ralmq.workers.texts.files import build_text
from ralmq.workers.texts.index import TextIndex

VECTORS = np.random.default_rng(4).normal(size=(50, 4)).astype(np.float32)
RARE = [{"rare": 1} if row == 0 else {"common": row} for row in range(10)]


def test_filters_are_kept_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "CACHE", 1 << 20)
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS, fields=[json.dumps({"n": row}) for row in range(50)])
    known = open_index(tmp_path / "v")._fields
    assert known is not None
    for number in range(60):
        wanted = parse({"n": {"in": [number, *(f"{number} {each:020d}" for each in range(1000))]}})
        assert np.count_nonzero(known.allowed(wanted)) == (number < 50)
    assert 10 < len(known._known) < 60 and known._kept < 1 << 20
    assert known._kept == sum(50 + kept.size for kept in known._known)


def test_a_shard_may_lack_a_field_that_another_one_has(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS[:10], fields=list(map(json.dumps, RARE)), shards=2)
    create_live(tmp_path / "live", name="v", dimension=4, shards=2)
    for shard, wanted in enumerate(([[0, -1]], [[-1, -1]])):
        place = f"shard-{shard}"
        found = answer(open_index(tmp_path / "v" / place), {"k": 2, "filter": {"rare": 1}}, [VECTORS[:1]])[1]
        assert found[0].tolist() == wanted
        index = open_live(tmp_path / "live" / place)
        index.add(VECTORS[shard:10:2], np.arange(shard, 10, 2), RARE[shard:10:2])
        assert answer(index.view(), {"k": 2, "filter": {"rare": 1}}, [VECTORS[:1]])[1][0].tolist() == wanted
        index.close()


def test_what_is_no_token_is_none() -> None:
    given = [{"tokens": [3, -5, "x", 2**31, 2**63, 2**31 - 1]}, {"tokens": 3}, {"tokens": [1, 2], "split": 1}]
    assert tokens_of(given, 6).tolist() == [[3, -1, -1, -1, -1, 2**31 - 1], [-1] * 6, [2, *[-1] * 5]]


def test_counts_of_one_answer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "MAX_COUNTS", 100)
    tokens = np.stack([np.zeros(40), np.arange(1, 41)], 1).ravel().astype(np.int32)
    table = NgramTable(TokenStream(tokens, ("a",), np.zeros(1, np.int64)), "t")
    assert table.answer({"ngram": 2}, [np.zeros((2, 1), np.int32)])[1][0].tolist() == [0, 40, 80]
    with pytest.raises(BadQuery, match="3 contexts; send fewer"):
        table.answer({"ngram": 2}, [np.zeros((3, 1), np.int32)])


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e37])
def test_vectors_of_any_length_get_length_1(scale: float) -> None:
    given = np.array([[3, 4, 0], [0, 0, 0], [1, 0, 0]], np.float32)
    given[:2] *= np.float32(scale)
    assert np.allclose(normalised(given), [[0.6, 0.8, 0], [0, 0, 0], [1, 0, 0]], atol=1e-6)


class Counting:
    """An index, and how many of its rows were searched for."""

    def __init__(self, index: OpenIndex) -> None:
        self.index = index
        self.rows = 0

    def search(self, queries: Any, *rest: Any, **how: Any) -> Any:
        self.rows += len(queries)
        return self.index.search(queries, *rest, **how)


def test_a_search_ends_soon_once_nobody_waits(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS, factory="IVF4,Flat")
    index = open_index(tmp_path / "v")
    counting: Any = Counting(index)
    queries = np.random.default_rng(5).normal(size=(5 * PIECE, 4)).astype(np.float32)
    lists, coarse = index.assign(queries, Params(nprobe=2))
    for asked in (Search(Params(k=3), queries), Search(Params(k=3), queries, lists, coarse)):
        counting.rows = 0
        (whole,) = search_together(counting, [asked])
        assert not isinstance(whole, Exception) and counting.rows == len(queries)
        wanted = index.search(queries, asked.params, asked.lists, asked.coarse)
        assert all(np.array_equal(a, b) for a, b in zip(whole, wanted, strict=True))
        counting.rows = 0
        (ended,) = search_together(counting, [asked], given_up=lambda: counting.rows > 0)
        assert isinstance(ended, RequestCancelled) and counting.rows == PIECE


def test_a_search_that_was_given_up_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes long; what comes next waits for one of them at most."""
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS)
    calls, real = [0], OpenIndex.search

    def slow(self: OpenIndex, queries: Any, *rest: Any, **how: Any) -> Any:
        calls[0] += 1
        if len(queries) > 1:
            asyncio.run(asyncio.sleep(0.3))
        return real(self, queries, *rest, **how)

    async def main() -> None:
        async with cluster(Index(index=tmp_path / "v", recall=0), inproc=True) as running:
            client = await running.client()
            many = np.random.default_rng(6).normal(size=(100 * PIECE, 4)).astype(np.float32)
            monkeypatch.setattr(OpenIndex, "search", slow)
            with pytest.raises(DeadlineExceeded):
                await client.search("v", many, k=1, payloads=False, deadline=0.5)
            await client.search("v", VECTORS[:1], k=1, payloads=False)
            assert calls[0] < 10

    asyncio.run(main())


def test_queries_of_text_end_once_nobody_waits(tmp_path: Path) -> None:
    build_text(tmp_path / "t", name="t", documents=[("d", "one two three")])
    index, asked = TextIndex(tmp_path / "t"), [0]

    def given_up() -> bool:
        asked[0] += 1
        return asked[0] > 3

    with pytest.raises(RequestCancelled):
        answer_text(index, {"text": ["one"] * 10}, [], given_up)
    assert asked[0] == 4
    index.close()


def test_ids_that_are_no_whole_numbers_change_nothing(tmp_path: Path) -> None:
    create_live(tmp_path / "v", name="v", dimension=4)

    async def main() -> None:
        async with cluster(Index(index=tmp_path / "v"), inproc=True) as running:
            client = await running.client()
            await client.add("v", VECTORS[:3])
            for wrong in ([1.9], ["1"], [[1]], [2**63]):
                with pytest.raises(Refused, match="give whole numbers"):
                    await client.delete("v", wrong)
                with pytest.raises(Refused, match="ids"):
                    await client.add("v", VECTORS[:1], wrong, upsert=True)
            assert await client.delete("v", []) == 0
            assert await client.delete("v", np.array([1], np.uint8)) == 1
            with pytest.raises(Refused, match="directory"):
                await client.request("search:v", {"open": "a\0b"})

    asyncio.run(main())


def test_a_change_of_texts_that_comes_again_is_not_made_twice(tmp_path: Path) -> None:
    """As where the broker gives it to the next server of the directory, the first one lost behind its commit."""
    build_text(tmp_path / "t", name="t", documents=[("d", "one two three")])
    first, second = TextIndex(tmp_path / "t"), TextIndex(tmp_path / "t")
    fields = [{"text": "four"}, {"text": "five"}]

    def made(index: TextIndex, request: bytes, body: dict[str, Any], *arrays: Any) -> Any:
        said, answered = answer_text(index, body, arrays, request=request)
        return said or answered[0].tolist()

    for index in (first, second):
        assert made(index, b"1", {"add": True, "fields": fields}) == [1, 2]
        assert made(index, b"2", {"add": True, "fields": fields[:1]}, np.array([9])) == [9]
        assert made(index, b"3", {"delete": True}, np.array([1, 9])) == {"deleted": 2}
    assert second.info()["ntotal"] == 2
    for _ in range(2):
        made(second, b"", {"add": True, "fields": fields})
    assert first.info()["ntotal"] == 6
    with pytest.raises(BadQuery, match="is there already"):
        made(first, b"4", {"add": True, "fields": fields[:1]}, np.array([2]))
    first.close()
    second.close()


def test_a_request_to_texts_is_known_by_its_id(tmp_path: Path) -> None:
    build_text(tmp_path / "t", name="t", documents=[("d", "one two three")])

    async def main() -> None:
        worker = Index(index=tmp_path / "t")
        await worker.start()
        for _ in range(2):
            request = Request("search:t", {"add": True, "fields": [{"text": "four"}]}, [], id=bytes(15) + b"1")
            answered: Any = await worker.handle(request)
            assert answered[1][0].tolist() == [1]
        await worker.stop()

    asyncio.run(main())
