"""Search against brute force, payloads, passages, and queries that are refused."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from ralmq.schema.errors import Refused
from ralmq.workers.index.query import MAX_HITS, BadQuery, Params
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.search.answer import answer

Build = Callable[..., Path]
RNG = np.random.default_rng(7)


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def long_stream(count: int) -> TokenStream:
    return TokenStream((np.arange(count, dtype=np.int32) * 7) % 50, ("a",), np.array([0]))


def brute(vectors: np.ndarray, queries: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    keys, asked = vectors.astype(np.float64), queries.astype(np.float64)
    scores = -(asked @ keys.T) if metric == "ip" else ((asked[:, None] - keys[None]) ** 2).sum(axis=2)
    ids = np.argsort(scores, axis=1)[:, :k]
    found = np.take_along_axis(scores, ids, axis=1)
    return ids, -found if metric == "ip" else found


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
def test_search_is_exact(build: Build, metric: str, factory: str) -> None:
    vectors, queries = numbers(600, 12), numbers(9, 12)
    stream = long_stream(601)
    index = open_index(build(vectors=vectors, stream=stream, entries=stream.entries(), metric=metric, factory=factory))
    ids, distances = index.search(queries, Params(5, nprobe=8))
    wanted, scores = brute(vectors, queries, 5, metric)
    assert ids.dtype == np.int64 and distances.dtype == np.float32
    assert ids.tolist() == wanted.tolist()
    np.testing.assert_allclose(distances, scores, rtol=1e-5)


def test_nprobe_is_the_number_of_lists_looked_into(build: Build) -> None:
    vectors, stream = numbers(600, 12), long_stream(601)
    index = open_index(build(vectors=vectors, stream=stream, entries=stream.entries(), factory="IVF20,Flat"))
    found = [int((index.search(vectors[:1], Params(600, nprobe=probe))[0] >= 0).sum()) for probe in (1, 2, 8, 20)]
    assert found == sorted(found) and found[0] < found[2] < 600 == found[3]
    assert int((index.search(vectors[:1], Params(600))[0] >= 0).sum()) == found[2]  # 8 is the default
    ids, distances = index.search(vectors[:1], Params(600, nprobe=1))
    assert np.isinf(distances[ids < 0]).all() and np.isfinite(distances[ids >= 0]).all()


@pytest.mark.parametrize(("metric", "far"), [("l2", np.inf), ("ip", -np.inf)])
def test_more_asked_than_there_are(build: Build, metric: str, far: float) -> None:
    ids, distances = open_index(build(metric=metric)).search(numbers(2, 4), Params(30))
    assert sorted(ids[0, :17].tolist()) == list(range(17))
    assert (ids[:, 17:] == -1).all() and (distances[:, 17:] == far).all()


def test_no_queries(build: Build) -> None:
    index = open_index(build())
    ids, distances = index.search(numbers(0, 4), Params(3))
    assert ids.shape == distances.shape == (0, 3)
    assert index.following(ids).shape == (0, 3, 8)


def test_queries_out_of_a_frame_are_copied(build: Build) -> None:
    index, queries = open_index(build()), numbers(3, 4)
    frame = b"x" + queries.tobytes()
    misaligned = np.frombuffer(frame, np.uint8)[1:].view(np.float32).reshape(3, 4)
    assert not misaligned.flags.aligned
    turned = np.asfortranarray(queries)
    for given in (misaligned, turned):
        assert found(index, given).tolist() == found(index, queries).tolist()


def found(index: OpenIndex, queries: np.ndarray) -> np.ndarray:
    return answer(index, {"k": 4}, [queries])[1][0]


def good(index: OpenIndex, **changed: Any) -> Any:
    asked = {"queries": numbers(2, 4), "k": 3, **changed}
    return answer(index, asked, [asked.pop("queries")])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"queries": numbers(2, 5)}, "queries have shape [2, 5]; the index docs wants [m, 4]"),
        ({"queries": numbers(4)}, "queries have shape [4]"),
        ({"queries": numbers(2, 4).astype(np.float64)}, "queries are float64; send float32"),
        ({"queries": np.array([[0, 0, 0, np.nan]], np.float32)}, "NaN or infinity"),
        ({"queries": np.array([[0, -np.inf, 0, 0]], np.float32)}, "NaN or infinity"),
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"k": 1025}, "k is 1025; send a whole number from 1 to 1024"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": True}, "k is True"),
        ({"k": None}, "k is None"),
        ({"nprobe": 0}, "nprobe is 0"),
        ({"nprobe": -1}, "nprobe is -1"),
        ({"nprobe": "8"}, "nprobe is '8'"),
        ({"queries": np.zeros((MAX_HITS // 1024 + 1, 4), np.float32), "k": 1024}, "send them in parts"),
    ],
)
def test_bad_queries(build: Build, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(BadQuery) as caught:
        good(open_index(build()), **changed)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, Refused)


def test_following(build: Build) -> None:
    """Documents hold 100-106, 107 and 108-119; entries skip each document's last token."""
    index = open_index(build())
    found = index.following(np.array([[0, 5], [-1, 6]]))
    assert found.dtype == np.int32
    assert found[0, 0].tolist() == [101, 102, 103, 104, 105, 106, -1, -1]
    assert found[0, 1].tolist() == [106] + [-1] * 7
    assert found[1, 0].tolist() == [-1] * 8
    assert found[1, 1].tolist() == list(range(109, 117))


@pytest.mark.parametrize("ids", [[17], [-2]])
def test_ids_outside(build: Build, ids: list[int]) -> None:
    index = open_index(build())
    for call in (index.following, index.passages):
        with pytest.raises(BadQuery, match="ids leave the index"):
            call(np.array(ids))


def test_passages(build: Build) -> None:
    index = open_index(build())
    near, none, inside, whole = index.passages(np.array([0, -1, 11, 16]), before=3, after=2)
    assert near is not None and none is None and inside is not None and whole is not None
    assert (near.document, near.start, near.split, near.tokens.tolist()) == ("a.txt", 0, 1, [100, 101, 102])
    assert (inside.document, inside.start, inside.split) == ("c.txt", 3, 3)
    assert inside.tokens.tolist() == [111, 112, 113, 114, 115]
    assert (whole.split, whole.tokens.tolist()) == (3, [116, 117, 118, 119])
    with pytest.raises(BadQuery, match="one dimension"):
        index.passages(np.array([0]), before=-1)


def test_threads_are_set_where_the_search_runs(build: Build) -> None:
    """OpenMP counts threads per calling thread: a number set when the index is opened would not hold in a pool."""
    index = open_index(build())
    seen: list[int] = []

    def work() -> None:
        index.search(numbers(1, 4), Params(1), threads=3)
        seen.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3]
