"""A live index within one process: what is found is what was added and not deleted, on every kind of index."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_state import D, Truth, made, small, vectors
from ralmq.schema.errors import WorkerFailed
from ralmq.workers.index.filter import BadFilter
from ralmq.workers.index.query import BadQuery, Params
from ralmq.workers.live import live as module
from ralmq.workers.live import merging, segments
from ralmq.workers.live.changes import BadChange
from ralmq.workers.live.live import LiveIndex
from ralmq.workers.live.opening import open_live
from ralmq.workers.live.segments import Part

EXACT = {"Flat", "IVF4,Flat", "HNSW16"}
INT = np.int64


def kinds(index: LiveIndex) -> set[str]:
    return {type(part.segment.index).__name__ for part in index.view().state.parts}


def changes(index: LiveIndex, truth: Truth, rounds: int, seed: int) -> None:
    """Adds with ids and without, upserts, deletes; each is seen by the next search."""
    random = np.random.default_rng(seed)
    for turn in range(rounds):
        given = random.normal(size=(int(random.integers(1, 25)), D)).astype(np.float32)
        truth.put(index.add(given), given)
        own = np.array(sorted(truth.known), INT)
        if turn % 3 == 0:
            some = random.choice(own, 5, replace=False)
            truth.put(some, given[:1].repeat(5, 0))
            index.add(given[:1].repeat(5, 0), some, upsert=True)
            query = index.view().search(given[:1], Params(k=5, exact=True))
            assert set(query[0][0]) <= {*some.tolist(), *own.tolist()}
        if turn % 4 == 1:
            some = np.append(random.choice(own, 8, replace=False), [10**12])
            assert index.delete(some) == truth.drop(some)
            assert not index.view().state.has(some).any()


@pytest.mark.parametrize(
    ("factory", "metric"),
    [
        *itertools.product(["Flat", "IVF4,Flat", "HNSW16"], ["l2", "ip", "cosine"]),
        ("IVF4,SQ8", "l2"),
        ("IVF4,PQ1", "l2"),
    ],
)
def test_what_is_found_is_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, metric: str
) -> None:
    small(monkeypatch)
    index, truth = made(tmp_path / "docs", factory, metric), Truth(metric)
    for part in range(4):
        changes(index, truth, 20, part)
        index.settle()
        if part == 1:
            index.snapshot()
        assert index.view().state.count == len(truth.known)
        everything = index.view().search(vectors(2), Params(k=1000, exact=True))[0]
        assert set(everything[everything >= 0].tolist()) == set(truth.known)
        if factory in EXACT:
            ids, distances = index.view().search(vectors(7, 5), Params(k=10, exact=True))
            best = truth.nearest(vectors(7, 5), 10)[1]
            np.testing.assert_allclose(distances, best, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(distances, truth.distances(vectors(7, 5), ids), rtol=1e-4, atol=1e-5)
    assert kinds(index) - {"IndexFlat"} or factory == "Flat"
    index.close()


def test_ties_between_segments_are_in_the_order_of_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "RECENT", 32)
    index, same = made(tmp_path / "docs"), vectors(1)
    for number in (5, 90, 7, 3, 40):
        index.add(same, np.array([number]))
        index.add(vectors(40, number), np.arange(40) + 1000 * number)
    assert len(index.view().state.parts) > 1
    assert index.view().search(same, Params(k=4))[0].tolist() == [[3, 5, 7, 40]]
    index.close()


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_an_old_view_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    small(monkeypatch)
    index, given = made(tmp_path / "docs", factory), vectors(300)
    index.add(given, np.arange(300), [{"color": "red" if row % 2 else "blue"} for row in range(300)])
    index.settle()
    view, asked = index.view(), Params.of({"k": 20, "exact": True, "filter": {"color": "red"}})
    before = index.view().search(given[:3], asked)
    index.add(vectors(200, 1), np.arange(200), [{"color": "green"}] * 200, upsert=True)
    index.delete(np.arange(200, 300))
    for _ in range(3):
        index.snapshot()  # drops what no restart needs; the view still does
        index.add(vectors(1, 2))
    index.settle()
    ids, distances = view.search(given[:3], asked)
    assert ids.tolist() == before[0].tolist() and distances.tolist() == before[1].tolist()
    assert (ids % 2 == 1).all()
    assert {each["color"] for row in view.payloads(ids) for each in row} == {"red"}
    assert {each["color"] for each in index.view().payloads(np.arange(10)[None])[0]} == {"green"}
    with pytest.raises(BadFilter, match="no entry has the field size"):
        index.view().search(given[:1], Params.of({"filter": {"size": 3}}))
    index.close()


def test_filters_and_payloads_follow_the_changes(tmp_path: Path) -> None:
    index, given = made(tmp_path / "docs"), vectors(20)
    index.add(given, np.arange(20), [{"n": row, "deep": {"odd": bool(row % 2)}} for row in range(20)])

    def found(condition: Any) -> list[int]:
        ids = index.view().search(given[:1], Params.of({"k": 30, "filter": condition}))[0][0]
        return sorted(ids[ids >= 0].tolist())

    assert found({"n": {"lt": 3}}) == [0, 1, 2] and found({"deep.odd": True}) == list(range(1, 20, 2))
    index.add(given[:2], np.array([1, 50]), [{"n": 100}, {"n": 1}], upsert=True)
    index.delete(np.array([2]))
    assert found({"n": {"lt": 3}}) == [0, 50] and found({"n": 100}) == [1]
    index.add(given[:1], np.array([60]))
    assert found({"not": {"n": {"gte": 0}}}) == [60]
    assert index.view().payloads(np.array([[50, 0, -1, 60]])) == [[{"n": 1}, {"n": 0, "deep": {"odd": False}}, {}, {}]]
    index.close()


def test_a_change_that_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    index, given = made(tmp_path / "docs"), vectors(3)
    index.add(given, np.array([1, 2, 3]))
    seq = index.view().state.seq
    for wrong, said in (
        ((given[:, :3],), r"takes float32 \[n, 16\]"),
        ((given.astype(np.float64),), "vectors are float64"),
        ((np.full((1, D), np.nan, np.float32),), "NaN"),
        ((given, np.array([4, 5, 5])), "comes twice"),
        ((given, np.array([-1, 5, 6])), "ids leave 0"),
        ((given, np.array([4, 5])), "2 ids for 3"),
        ((given, np.array([3, 4, 5])), "id 3 is there already"),
        ((given, np.array([4.0, 5.0, 6.0])), "ids are float64"),
        ((given, None, [{}]), "no list of 3 maps"),
        ((given[:1], None, [{"a": float("nan")}]), "fields of vector 0"),
        ((given[:1], None, [{"a": b"bytes"}]), "fields of vector 0"),
        ((given, np.array([(1 << 63) - 2, 4, 5])), ""),
        ((given[:1],), "no free ids"),
    ):
        if not said:
            index.add(*wrong)  # the highest id there is
            seq += 1
            continue
        with pytest.raises(BadChange, match=said):
            index.add(*wrong)
        assert index.view().state.seq == seq
    with pytest.raises(BadQuery, match="no lists"):
        index.view().centroids()
    with pytest.raises(BadQuery, match="no tokens"):
        index.view().following(np.array([[1]]))
    index.close()
    with pytest.raises(WorkerFailed, match="closed"):
        index.add(given)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_changes_during_a_merge_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    """Whatever comes while segments are merged is in the state that the merge ends with."""
    small(monkeypatch)
    index, truth, given = made(tmp_path / "docs", factory), Truth(), vectors(200)
    truth.put(index.add(given), given)
    index.settle()
    whole, calls = merging.merged, itertools.count()

    def interrupted(*asked: Any) -> Any:
        done = whole(*asked)
        if next(calls) == 0:
            index.delete(np.arange(50))
            index.add(given[50:60], np.arange(100, 110), upsert=True)
            index.add(given[:1], np.array([0]))  # comes back with another vector than its old row's neighbours
        return done

    monkeypatch.setattr(merging, "merged", interrupted)
    index.snapshot()
    truth.drop(np.arange(50))
    truth.put(np.arange(100, 110), given[50:60])
    truth.put(np.array([0]), given[:1])
    ids, _ = index.view().search(given, Params(k=1, exact=True))
    assert ids.tolist() == truth.nearest(given, 1)[0].tolist()
    assert index.view().state.count == len(truth.known) == 151
    index.close()
    again = open_live(tmp_path / "docs")
    assert again.view().state.count == 151
    assert again.view().search(given, Params(k=1, exact=True))[0].tolist() == ids.tolist()
    again.close()


def test_a_merge_that_fails_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small(monkeypatch)
    index, tried = made(tmp_path / "docs"), threading.Event()

    def failing(*_: Any) -> Any:
        tried.set()
        raise MemoryError

    monkeypatch.setattr(merging, "merged", failing)
    for number in range(10):
        index.add(vectors(40, number), np.arange(40) + 1000 * number)
    assert tried.wait(10)
    assert index.view().state.count == 400
    index.close()
    assert "segments are served as they are" in caplog.text


def test_an_inverted_file_is_trained_once_there_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    trained, count = merging.trained, []
    monkeypatch.setattr(merging, "trained", lambda *asked: count.append(trained(*asked) is not None) or trained(*asked))
    index, given = made(tmp_path / "docs", "IVF4,Flat"), vectors(1000)
    index.add(given[:100])
    index.settle()
    assert kinds(index) == {"IndexFlat"} and index.view().info()["nlist"] == 0
    for start in range(100, 1000, 50):
        index.add(given[start : start + 50])
    index.settle()
    view = index.view()
    assert "IndexIVFFlat" in kinds(index) and view.info()["nlist"] == 4 and sum(count) == 1
    centroids, owners = view.centroids()
    assert centroids.shape == (4, D) and owners.tolist() == [0] * 4
    params = Params(k=10, nprobe=2)
    lists, coarse = view.assign(given[:9], params)
    plain, preassigned = view.search(given[:9], params), view.search(given[:9], params, lists, coarse)
    assert plain[0].tolist() == preassigned[0].tolist() and plain[1].tolist() == preassigned[1].tolist()
    index.close()


def test_concurrent_changes_share_their_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, given = made(tmp_path / "docs"), vectors(500)
    commit, groups, gate = index.log.commit, [], threading.Event()

    def counted(changes: Any, next_id: int) -> None:
        gate.wait(10)
        groups.append(len(changes))
        commit(changes, next_id)

    monkeypatch.setattr(index.log, "commit", counted)
    asked = [index.submit(index.room.add(given[row : row + 1], np.array([row]))) for row in range(500)]
    asked.append(index.submit(index.room.add(given[:1], np.array([7]))))  # is there by then: refused alone
    asked.append(index.submit(index.room.add(given[:1], np.array([9]), upsert=True)))
    asked.append(index.submit(index.room.delete(np.array([3, 3, 999]))))
    gate.set()
    assert [int(change.done.result()[0]) for change in asked[:500]] == list(range(500))
    with pytest.raises(BadChange, match="id 7 is there already"):
        asked[500].done.result()
    assert asked[502].done.result().tolist() == [1]
    assert sum(groups) == 502 and len(groups) <= 3
    ids = index.view().search(given, Params(k=1))[0][:, 0].tolist()
    assert ids[:3] == [0, 1, 2] and ids[4:9] == [4, 5, 6, 7, 8] and index.view().state.count == 499
    index.close()


def test_a_request_that_comes_again_is_not_done_twice(tmp_path: Path) -> None:
    index, given, name = made(tmp_path / "docs"), vectors(4), b"0123456789abcdef"
    first = index.submit(index.room.add(given, request=name)).done.result()
    again = index.submit(index.room.add(given, request=name)).done.result()
    own = [index.submit(index.room.add(given, np.arange(50, 54), request=b"own")) for _ in range(2)]
    assert [each.done.result().tolist() for each in own] == [[50, 51, 52, 53]] * 2
    gone = [index.submit(index.room.delete(np.array([50, 51]), request=b"gone")) for _ in range(2)]
    assert [each.done.result().tolist() for each in gone] == [[2]] * 2
    assert first.tolist() == again.tolist() == [0, 1, 2, 3] and index.view().state.count == 6
    index.close()
    index = open_live(tmp_path / "docs")
    assert index.submit(index.room.add(given, request=name)).done.result().tolist() == first.tolist()
    assert index.view().state.count == 6
    index.close()


def test_a_log_that_cannot_be_written_is_an_error_and_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = made(tmp_path / "docs")
    index.add(vectors(2))
    write = index.log._write

    def full(*asked: Any) -> None:
        write(*asked)
        raise module.sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(index.log, "_write", full)
    with pytest.raises(WorkerFailed, match="disk is full"):
        index.add(vectors(2))
    monkeypatch.undo()
    assert index.view().state.count == 2
    assert index.add(vectors(1)).tolist() == [2]
    index.close()
    index = open_live(tmp_path / "docs")
    assert index.view().state.count == 3
    index.close()


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8", "HNSW16"])
def test_searches_go_on_while_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    """Each search that begins after an answer sees it: what was added is there, what was deleted never again."""
    small(monkeypatch)
    index, given = made(tmp_path / "docs", factory), vectors(1500)
    index.add(given[:500], np.arange(500))
    dead: set[int] = set()
    dying: set[int] = set()
    added, ended, searches = [500], threading.Event(), itertools.count()

    def search() -> int:
        random = np.random.default_rng(threading.get_ident() % 1000)
        while not ended.is_set():
            gone, top = frozenset(dead), added[0]
            rows = random.integers(0, top, 4)
            ids, _ = index.view().search(given[rows], Params(k=3, exact=True))
            assert not gone & set(ids.ravel().tolist())
            for row, nearest in zip(rows.tolist(), ids[:, 0].tolist(), strict=True):
                assert row == nearest or row in dying or factory == "IVF4,SQ8"
            next(searches)
        return next(searches)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(search) for _ in range(2)]
        try:
            for start in range(500, 1500, 20):
                index.add(given[start : start + 20], np.arange(start, start + 20))
                added[0] = start + 20
                gone = np.arange(start - 400, start - 390)
                dying.update(gone.tolist())
                assert index.delete(gone) == 10
                dead.update(gone.tolist())
        finally:
            ended.set()
        assert sum(each.result() for each in running) > 2
    index.close()


def test_what_is_chosen_for_a_merge() -> None:
    def part(rows: int, alive: int) -> Any:
        class Sized(Part):
            count = alive

        segment = type("S", (), {"index": merging.faiss.IndexHNSWFlat(1, 4)})()
        return Sized(segment, np.arange(rows))

    good = [part(100_000, 100_000), part(9000, 9000)]
    assert merging.chosen(good, "HNSW16", False) == []
    tired = part(10_000, 7000)
    assert merging.chosen([*good, tired], "HNSW16", False) == [tired]
    few = [part(100, 100) for _ in range(merging.MANY)]
    assert merging.chosen([*good, *few], "HNSW16", False) == []
    many = [part(1000, 1000) for _ in range(merging.MANY + 1)]
    assert set(map(id, merging.chosen([*good, *many], "HNSW16", False))) == {*map(id, many), id(good[1])}
    assert merging.wanted("IVF100,SQ8") == 3900 and merging.wanted("IVF100,PQ4") == 256 * 39
