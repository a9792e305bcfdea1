"""Requests that are answered together get what each would get alone; equal queries are computed once."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.schema.errors import Refused
from ralmq.schema.tensor import tensor_of
from ralmq.workers.base import Request
from ralmq.workers.index.quantizer import Quantizer
from ralmq.workers.index.query import Params
from ralmq.workers.index.segment import Segment
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.search.answer import Asked, answer, answers
from ralmq.workers.search.worker import Index

RNG = np.random.default_rng(4)
VECTORS = RNG.normal(size=(2000, 16)).astype(np.float32)


def queries(count: int) -> np.ndarray:
    return RNG.normal(size=(count, 16)).astype(np.float32)


@pytest.fixture(scope="module", params=["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,PQ4", "HNSW16"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("batch") / "v"
    write_vectors(out, name="v", vectors=VECTORS, factory=request.param)
    return out


class Counted:
    """An index that counts the rows of each search."""

    def __init__(self, index: OpenIndex, fails: int = -1) -> None:
        self._index, self._fails, self.rows = index, fails, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def search(self, asked: np.ndarray, params: Params, *given: Any, **how: Any) -> Any:
        self.rows.append(len(asked))
        if (asked == self._fails).any():
            raise RuntimeError("a fault of faiss")
        return self._index.search(asked, params, *given, **how)


def same(found: Any, wanted: Any) -> bool:
    return found[0] == wanted[0] and all(np.array_equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


def test_as_if_alone(path: Path) -> None:
    index = open_index(path)
    asked = [Asked({"k": 1 + place % 3}, [queries(1 + place % 5)]) for place in range(40)]
    asked += [Asked({"k": 5, "payloads": True}, [queries(30)]), Asked({"k": 5, "exact": True}, [queries(30)])]
    counted = Counted(index)
    found = answers(counted, asked)
    assert all(same(one, answer(index, each.body, each.arrays)) for one, each in zip(found, asked, strict=True))
    assert len(counted.rows) == 5  # k 1, 2, 3, 5, and 5 exactly


def test_equal_queries_are_computed_once(path: Path) -> None:
    index = Counted(open_index(path))
    few = queries(3)
    asked = [Asked({"k": 4}, [few[[place % 3, (place + 1) % 3]]]) for place in range(20)]
    found = answers(index, asked)
    assert index.rows == [3]
    assert all(same(one, answer(index, each.body, each.arrays)) for one, each in zip(found, asked, strict=True))


def test_lists_of_different_askers(path: Path) -> None:
    index = open_index(path)
    if not index.nlist:
        return
    asked = []
    for nprobe in (3, 3, 5):
        some = queries(4)
        asked.append(
            Asked({"lists": True, "k": 6}, [some, *answer(index, {"assign": True, "nprobe": nprobe}, [some])[1]])
        )
    asked.append(Asked({"lists": True, "k": 6}, [asked[0].arrays[0], asked[1].arrays[1], asked[1].arrays[2]]))
    counted = Counted(index)
    found = answers(counted, asked)
    assert sorted(counted.rows) == [4, 12]  # equal queries with other lists are others
    assert all(same(one, answer(index, each.body, each.arrays)) for one, each in zip(found, asked, strict=True))


def test_a_wrong_one_fails_alone(path: Path) -> None:
    index = open_index(path)
    some = queries(2)
    wrong = [
        Asked({"k": 0}, [some]),
        Asked({}, [some[:, :3]]),
        Asked({}, [np.full((1, 16), np.nan, np.float32)]),
        Asked({"filter": {"a": 1}}, [some]),
        Asked({"following": True}, [some]),
        Asked({"payloads": True, "k": 1024}, [some]),
        Asked({}, []),
    ]
    found = answers(index, [*wrong, Asked({}, [some]), Asked({"info": True}, [])])
    assert all(isinstance(one, Refused) for one in found[: len(wrong)])
    assert same(found[-2], answer(index, {}, [some])) and found[-1][0] == index.info()


def test_a_fault_of_a_call_is_no_others_fault(path: Path) -> None:
    index = open_index(path)
    good, bad = queries(2), np.full((1, 16), 7, np.float32)
    found = answers(Counted(index, fails=7), [Asked({}, [good]), Asked({}, [bad]), Asked({}, [good[:1]])])
    assert isinstance(found[1], RuntimeError)
    assert same(found[0], answer(index, {}, [good])) and same(found[2], answer(index, {}, [good[:1]]))


def test_concurrent_requests_are_few_calls(path: Path) -> None:
    async def main() -> None:
        worker = Index(index=path, recall=0)
        await worker.start()
        some = queries(200)
        asked = [Request("search:v", {"k": 3}, [tensor_of(some[row : row + 1])]) for row in range(200)]
        found = await asyncio.gather(*(worker.handle(request) for request in asked))
        index = open_index(path)
        for row, one in enumerate(found):
            assert same(one, answer(index, {"k": 3}, [some[row : row + 1]]))
        assert worker._counts["searches"] == 200 and worker._counts["calls"] <= 3
        with pytest.raises(Refused, match="k is 0"):
            await worker.handle(Request("search:v", {"k": 0}, [tensor_of(some)]))
        await worker.stop()

    asyncio.run(main())


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8"])
def test_list_by_list_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, factory: str) -> None:
    """Many queries are searched list by list, few of them query by query; parts of bounded size, too."""
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS, factory=factory, metric=metric)
    index, many = open_index(tmp_path / "v"), queries(100)
    calls: list[int] = []
    real: Callable[..., Any] = Segment._by_list
    monkeypatch.setattr(Segment, "_by_list", lambda self, *given: calls.append(len(given[0])) or real(self, *given))
    monkeypatch.setattr("ralmq.workers.index.segment.BY_LIST", 64 * 4 * (16 + 3 * 5))
    lists, coarse = answer(index, {"assign": True, "nprobe": 4}, [many])[1]
    lists[::2, 1] = -1
    for body, more in (({"k": 5, "nprobe": 4}, []), ({"k": 5, "lists": True}, [lists, coarse])):
        together = answer(index, body, [many, *more])[1]
        assert calls == [64, 36]
        calls.clear()
        alone = [answer(index, body, [many[row : row + 1], *(a[row : row + 1] for a in more)])[1] for row in range(100)]
        assert calls == []
        for place in range(2):
            assert np.array_equal(together[place], np.concatenate([one[place] for one in alone]))


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ32", "HNSW8"])
def test_wide_vectors_give_the_same_bits_in_any_number(tmp_path: Path, metric: str, factory: str) -> None:
    """From 128,000 numbers in one call on faiss computes distances in another way."""
    rng = np.random.default_rng(8)
    given, asked = rng.normal(size=(2, 400, 512)).astype(np.float32)
    write_vectors(tmp_path / "w", name="w", vectors=given, factory=factory, metric=metric)
    index = open_index(tmp_path / "w")
    for params in (Params(k=4, nprobe=3), Params(k=4, exact=True)):
        together, alone = (
            index.search(asked, params),
            [index.search(asked[row : row + 1], params) for row in range(400)],
        )
        for place in range(2):
            assert np.array_equal(together[place], np.concatenate([found[place] for found in alone]))
    if index.nlist:
        quantizer = Quantizer(index.centroids()[0], metric)
        lists, coarse = zip(*(quantizer.assign(asked[row : row + 1], 3) for row in range(400)), strict=True)
        chosen = index.assign(asked, Params(nprobe=3))
        assert np.array_equal(chosen[0], np.concatenate(lists)) and np.array_equal(chosen[1], np.concatenate(coarse))
