"""Shards merged by hand, with lists chosen by the index or by the asker, give what one whole faiss index gives."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from ralmq.workers.index.directory import OutputError
from ralmq.workers.index.quantizer import Quantizer
from ralmq.workers.index.query import BadQuery
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.search.answer import Asked, answer, answers

N, D, LISTS = 3000, 16, 40
RNG = np.random.default_rng(11)
VECTORS = RNG.normal(size=(N, D)).astype(np.float32)
VECTORS[1500:1600] = VECTORS[:100]  # equal distances
QUERIES = np.concatenate([RNG.normal(size=(20, D)), VECTORS[:5]]).astype(np.float32)
FACTORIES = [f"IVF{LISTS},Flat", f"IVF{LISTS},SQ8", f"IVF{LISTS},PQ4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("shards")

    @cache
    def build(factory: str, metric: str, shards: int, by: str) -> Path:
        out = folder / f"{factory}-{metric}-{shards}-{by}"
        write_vectors(out, name="v", vectors=VECTORS, factory=factory, metric=metric, shards=shards, by=by)
        return out

    return build


def opened(path: Path, shards: int) -> list[OpenIndex]:
    return [open_index(path)] if shards == 1 else [open_index(path / f"shard-{shard}") for shard in range(shards)]


def merged(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([part[0] for part in found], axis=1)
    distances = np.concatenate([part[1] for part in found], axis=1)
    keys = np.where(ids < 0, np.inf, distances if metric == "l2" else -distances)
    order = np.lexsort((ids, keys), axis=1)[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)


def unique(distances: np.ndarray) -> np.ndarray:
    """Where a distance is the only one of its row, and not the last: an equal one may have been cut off."""
    equal = distances[:, 1:] == distances[:, :-1]
    alone = np.ones(distances.shape, bool)
    alone[:, 1:] &= ~equal
    alone[:, :-1] &= ~equal
    alone[:, -1] = False
    return alone


def whole(path: Path, k: int, nprobe: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """What faiss itself finds in the whole index."""
    index = faiss.read_index(str(path / "index.faiss"))
    queries = QUERIES.copy()
    if metric == "cosine":
        faiss.normalize_L2(queries)
    faiss.omp_set_num_threads(1)
    distances, ids = index.search(queries, k, params=faiss.SearchParametersIVF(nprobe=nprobe))
    return ids, np.where(ids < 0, np.inf if metric == "l2" else -np.inf, distances)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(("shards", "by"), [(1, "rows"), (2, "rows"), (4, "rows"), (2, "list"), (4, "list")])
def test_shards_are_one_index(made: Callable[..., Path], metric: str, factory: str, shards: int, by: str) -> None:
    path = made(factory, metric, shards, by)
    parts = opened(path, shards)
    centroids, owners = answer(parts[-1], {"quantizer": True}, [])[1]
    assert centroids.shape == (LISTS, D) and owners.shape == (LISTS,)
    quantizer = Quantizer(centroids, metric)
    for k in (1, 10, 100):
        for nprobe in (1, 8, 32):
            wanted_ids, wanted = whole(made(factory, metric, 1, "rows"), k, nprobe, metric)
            lists, coarse = quantizer.assign(QUERIES, nprobe)
            asked = [({}, [QUERIES]), ({"lists": True}, [QUERIES, lists, coarse])]
            both = []
            for more, arrays in asked:
                body = {"k": k, "nprobe": nprobe, **more}
                found = [tuple(answer(part, body, arrays)[1]) for part in parts]
                ids, distances = merged(found, k, metric)
                assert np.array_equal(distances, wanted)
                alone = unique(wanted)
                assert np.array_equal(ids[alone], wanted_ids[alone])
                tied = (ids[:, 1:] >= 0) & (distances[:, 1:] == distances[:, :-1])
                assert (ids[:, 1:] > ids[:, :-1])[tied].all()
                both.append((ids, distances))
            assert np.array_equal(both[0][0], both[1][0]) and np.array_equal(both[0][1], both[1][1])


@pytest.mark.parametrize("factory", FACTORIES)
def test_shards_by_list_hold_whole_lists(made: Callable[..., Path], factory: str) -> None:
    parts = opened(made(factory, "l2", 4, "list"), 4)
    owners = answer(parts[0], {"owners": True}, [])[1][0]
    sizes = []
    for shard, part in enumerate(parts):
        lists = part.segment.index.invlists
        held = np.array([lists.list_size(number) for number in range(LISTS)])
        assert not held[owners != shard].any() and held.sum() == part.manifest.ntotal
        assert np.array_equal(answer(part, {"owners": True}, [])[1][0], owners)
        sizes.append(part.manifest.ntotal)
    assert sum(sizes) == N and max(sizes) - min(sizes) < N / LISTS
    ids = np.concatenate([part.segment.ids for part in parts if part.segment.ids is not None])
    assert sorted(ids.tolist()) == list(range(N))


def test_a_shard_that_owns_no_probed_list_need_not_be_asked(made: Callable[..., Path]) -> None:
    parts = opened(made(FACTORIES[0], "l2", 4, "list"), 4)
    lists, coarse = answer(parts[2], {"assign": True, "nprobe": 3}, [QUERIES])[1]
    owners = answer(parts[0], {"owners": True}, [])[1][0]
    assert lists.shape == coarse.shape == (len(QUERIES), 3)
    for shard, part in enumerate(parts):
        own = np.where(owners[lists] == shard, lists, -1)
        ids = answer(part, {"lists": True}, [QUERIES, own, coarse])[1][0]
        alone = answer(part, {"nprobe": 3}, [QUERIES])[1][0]
        assert np.array_equal(ids, alone)
        assert (ids[(own == -1).all(axis=1)] == -1).all()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("factory", ["Flat", "HNSW16"])
def test_exact_shards_of_other_kinds(made: Callable[..., Path], factory: str, metric: str) -> None:
    one = open_index(made(factory, metric, 1, "rows"))
    wanted_ids, wanted = answer(one, {"k": 10, "exact": True}, [QUERIES])[1]
    found = [
        tuple(answer(part, {"k": 10, "exact": True}, [QUERIES])[1])
        for part in opened(made(factory, metric, 4, "rows"), 4)
    ]
    ids, distances = merged(found, 10, metric)
    assert np.array_equal(distances, wanted)
    assert np.array_equal(ids[unique(wanted)], wanted_ids[unique(wanted)])


def test_information_of_a_shard(made: Callable[..., Path]) -> None:
    parts = opened(made(FACTORIES[0], "ip", 2, "list"), 2)
    said = [answer(part, {"info": True}, [])[0] for part in parts]
    assert [info["shard"] for info in said] == [0, 1] and sum(info["ntotal"] for info in said) == N
    for info in said:
        assert (info["shards"], info["by"], info["nlist"], info["metric"]) == (2, "list", LISTS, "ip")
        assert info["version"] == said[0]["version"] and info["kind"] == "vectors"
    other = answer(opened(made(FACTORIES[0], "ip", 2, "rows"), 2)[0], {"info": True}, [])[0]
    assert other["version"] != said[0]["version"]
    refused = answers(parts[0], [Asked({}, [QUERIES], whole=True), Asked({"info": True}, [], whole=True)])
    assert isinstance(refused[0], BadQuery) and "ask search:v/0 to search:v/1" in str(refused[0])
    assert not isinstance(refused[1], Exception)
    with pytest.raises(BadQuery, match="not 'old'; ask for its info again"):
        answer(parts[0], {"version": "old"}, [QUERIES])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({0: np.zeros((25, 3), np.int32)}, r"list ids are int32"),
        ({0: np.zeros((24, 3), np.int64)}, r"send int64 \[25, nprobe\]"),
        ({0: np.zeros((25, 41), np.int64)}, "nprobe from 1 to 40"),
        ({0: np.full((25, 3), 40)}, "leave the index"),
        ({0: np.full((25, 3), -2)}, "leave the index"),
        ({1: np.zeros((25, 3))}, "coarse distances are float64"),
        ({1: np.zeros((25, 2), np.float32)}, "coarse distances are"),
        ({1: np.full((25, 3), np.nan, np.float32)}, "coarse distances hold NaN"),
    ],
)
def test_bad_lists(made: Callable[..., Path], changed: dict[int, Any], said: str) -> None:
    index = open_index(made(FACTORIES[0], "l2", 1, "rows"))
    arrays = [np.zeros((25, 3), np.int64), np.zeros((25, 3), np.float32)]
    for place, array in changed.items():
        arrays[place] = array
    with pytest.raises(BadQuery, match=said):
        answer(index, {"lists": True}, [QUERIES, *arrays])


def test_what_only_lists_can_do(made: Callable[..., Path]) -> None:
    index = open_index(made("Flat", "l2", 1, "rows"))
    for body, arrays in (
        ({"lists": True}, [QUERIES, np.zeros((25, 1), np.int64), np.zeros((25, 1), np.float32)]),
        ({"quantizer": True}, []),
        ({"assign": True}, [QUERIES]),
    ):
        with pytest.raises(BadQuery, match="has no lists"):
            answer(index, body, arrays)
    lists = open_index(made(FACTORIES[0], "l2", 1, "rows"))
    with pytest.raises(BadQuery, match="nprobe is 41, the index has 40 lists"):
        answer(lists, {"nprobe": 41}, [QUERIES])
    with pytest.raises(BadQuery, match="ef is 0"):
        answer(lists, {"ef": 0}, [QUERIES])
    with pytest.raises(BadQuery, match="1 arrays came; send 3"):
        answer(lists, {"lists": True}, [QUERIES])


def test_a_mapped_index_answers_the_same(made: Callable[..., Path]) -> None:
    for factory in (*FACTORIES, "Flat", "HNSW16"):
        path = made(factory, "l2", 1, "rows")
        plain, mapped = (answer(open_index(path, mmap=mmap), {"k": 7}, [QUERIES])[1] for mmap in (False, True))
        assert np.array_equal(plain[0], mapped[0]) and np.array_equal(plain[1], mapped[1])


def test_an_index_in_shards_takes_the_place_of_a_whole_one(tmp_path: Path) -> None:
    out = tmp_path / "v"
    for shards in (1, 3, 2, 1):
        write_vectors(out, name="v", vectors=VECTORS[:50], shards=shards)
        names = sorted(path.name for path in out.iterdir())
        assert names == (["index.faiss", "manifest.json"] if shards == 1 else [f"shard-{i}" for i in range(shards)])
    write_vectors(out, name="v", vectors=VECTORS[:50], shards=2)
    (out / "shard-1" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"shard-1/notes\.txt"):
        write_vectors(out, name="v", vectors=VECTORS[:50])
