"""A live index after its process has ended: snapshots, the log behind them, kill -9, damage, the lock."""

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from live_child import vector
from live_state import D, made, small, vectors
from ralmq.workers.index.directory import OutputError
from ralmq.workers.index.manifest import ManifestError
from ralmq.workers.index.query import Params
from ralmq.workers.index.store import open_index
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.live import live
from ralmq.workers.live.log import LIVE, Log, Settings, create
from ralmq.workers.live.opening import create_live, is_live, open_live
from ralmq.workers.live.snapshot import found

Build = Callable[..., Path]
INT = np.int64


def everything(index: Any) -> dict[int, float]:
    ids, distances = index.view().search(vectors(1, 99), Params(k=1000, exact=True))
    nearest = dict(zip(ids[0].tolist(), distances[0].tolist(), strict=True))
    nearest.pop(-1, None)
    return nearest


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16"])
def test_a_restart_finds_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    small(monkeypatch)
    path = tmp_path / "docs"
    index = made(path, factory, "cosine")
    for turn in range(6):
        index.add(vectors(90, turn), fields=[{"turn": turn}] * 90)
        index.delete(np.arange(turn * 90, turn * 90 + 10))
        index.add(vectors(4, turn + 50), np.arange(turn * 90 + 5, turn * 90 + 9), upsert=True)
        index.add(vectors(3, turn + 80), np.arange(turn * 90 + 20, turn * 90 + 23), upsert=True)
        if turn % 2:
            index.snapshot()
        wanted, seq = everything(index), index.view().state.seq
        index.close()
        index = open_live(path)
        assert everything(index) == pytest.approx(wanted, abs=1e-5) and index.view().state.seq == seq
        payloads = index.view().payloads(np.array([[turn * 90 + 30, turn * 90 + 21]]))
        assert payloads == [[{"turn": turn}, {}]]
    assert index.add(vectors(1)).tolist() == [540]  # ids are not given twice
    index.close()


def test_a_snapshot_is_an_index_that_others_open(tmp_path: Path) -> None:
    index = made(tmp_path / "docs", "HNSW16")
    index.add(vectors(300), np.arange(300) * 7, [{"n": row} for row in range(300)])
    index.delete(np.array([7, 14]))
    version = index.snapshot()
    index.add(vectors(5, 1))
    (_, path), *rest = found(tmp_path / "docs")
    assert not rest
    for mmap in (False, True):
        replica = open_index(path, mmap=mmap)
        info = replica.info()
        assert (info["ntotal"], info["version"], info["factory"], info["live"]) == (298, version, "HNSW16", False)
        params = Params.of({"k": 3, "exact": True, "filter": {"n": {"in": [1, 5, 9]}}})
        assert sorted(replica.search(vectors(1), params)[0][0].tolist()) == [-1, 35, 63]
        assert replica.payloads(np.array([[35]])) == [[{"n": 5}]]
    index.close()


def test_the_log_is_forgotten_behind_two_snapshots(tmp_path: Path) -> None:
    index = made(tmp_path / "docs")
    for turn in range(4):
        index.add(vectors(10, turn))
        index.delete(np.array([turn * 10]))
        index.snapshot()
    kept = [seq for seq, _ in found(tmp_path / "docs")]
    assert kept == [8, 6] and index.log.forgotten == 6
    assert index.log._read("SELECT count(*) FROM vectors", ()) == [(1,)]
    assert index.log._read("SELECT count(*) FROM entries WHERE died IS NOT NULL", ()) == [(1,)]
    wanted = everything(index)
    index.close()
    damage(found(tmp_path / "docs")[0][1] / "index.faiss", 100)
    index = open_live(tmp_path / "docs")  # from the older one and the log behind it
    assert everything(index) == wanted
    index.close()
    damage(found(tmp_path / "docs")[1][1] / "ids.npy", 130)
    with pytest.raises(ManifestError, match="missing or damaged; restore the newest snapshot"):
        open_live(tmp_path / "docs")


def test_a_long_log_becomes_a_snapshot_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOGGED", 100)
    index = made(tmp_path / "docs")
    for turn in range(5):
        index.add(vectors(30, turn))
    end = time.monotonic() + 30
    while not found(tmp_path / "docs"):
        assert time.monotonic() < end
        time.sleep(0.01)
    index.close()  # after what its thread has begun
    index = open_live(tmp_path / "docs")
    assert index.view().state.count == 150
    index.close()


def damage(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def test_one_flipped_bit_is_refused_before_faiss_reads_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = made(tmp_path / "docs", "HNSW16")
    index.add(vectors(40), fields=[{"n": row} for row in range(40)])
    index.snapshot()
    wanted = everything(index)
    index.close()
    read, calls = faiss.read_index, []
    monkeypatch.setattr(faiss, "read_index", lambda *given: calls.append(given) or read(*given))
    ((_, path),) = found(tmp_path / "docs")
    files = sorted(path.iterdir())
    random = np.random.default_rng(0)
    assert {file.name for file in files} >= {"index.faiss", "ids.npy", "manifest.json", "manifest.sha256", "fields.db"}
    for file in files * 20:
        bit = int(random.integers(0, 8 * file.stat().st_size))
        damage(file, bit)
        with pytest.raises(ManifestError):
            open_index(path)
        damage(file, bit)
    assert not calls
    damage(path / "manifest.json", 333)
    with caplog.at_level(logging.WARNING):
        index = open_live(tmp_path / "docs")
    assert everything(index) == wanted and not calls and "a snapshot is left out" in caplog.text
    index.close()
    damage(path / "manifest.json", 333)
    open_live(tmp_path / "docs").close()
    assert len(calls) == 1


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW16"])
def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, factory: str) -> None:
    path, acknowledged = tmp_path / "docs", set[int]()
    made(path, factory).close()
    random = np.random.default_rng(3)
    for turn in range(3):
        child = Path(__file__).with_name("live_child.py")
        process = subprocess.Popen(
            [sys.executable, str(child), str(path), str(turn * 10_000)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(int(random.integers(50, 400))):
            line = process.stdout.readline()
            assert line, "the child ended by itself"
            acknowledged.add(int(line))
        process.kill()
        acknowledged.update(int(line) for line in process.stdout.read().split("\n")[:-1])
        process.wait()
        index = open_live(path)
        ids = np.array(sorted(acknowledged), INT)
        view = index.view()
        assert view.state.has(ids).all()
        nearest, distances = view.search(np.stack([vector(number) for number in ids.tolist()]), Params(k=1, exact=True))
        assert nearest[:, 0].tolist() == ids.tolist() and distances.max() < 1e-5
        assert view.payloads(ids[:50, None]) == [[{"n": number}] for number in ids[:50].tolist()]
        whole = view.search(vectors(1), Params(k=1024, exact=True))[0]
        assert len(np.unique(whole[whole >= 0])) == np.count_nonzero(whole >= 0)  # none twice
        index.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    index = made(tmp_path / "docs")
    with pytest.raises(ManifestError, match="is served already"):
        open_live(tmp_path / "docs")
    index.close()
    open_live(tmp_path / "docs").close()


def test_a_built_index_takes_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    path, given = tmp_path / "docs", vectors(60)
    texts = [f'{{"n":{row}}}' for row in range(60)]
    write_vectors(path, name="docs", vectors=given, fields=texts, factory="IVF4,Flat", encoder="mini")
    assert not is_live(path)
    index = open_live(path)
    assert is_live(path) and index.view().info() | {"ntotal": 60, "encoder": "mini", "nlist": 4} == index.view().info()

    def found_by(condition: Any) -> list[int]:
        ids = index.view().search(given[:1], Params.of({"k": 100, "filter": condition}))[0][0]
        return sorted(ids[ids >= 0].tolist())

    def check() -> None:
        assert index.view().payloads(np.array([[5, 3, 61]])) == [[{"n": 5}, {"n": 300}, {"m": 1}]]
        assert found_by({"n": {"lt": 5}}) == [0, 1, 4] and found_by({"m": 1}) == [61]
        assert found_by({"not": {"n": {"gte": 0}}}) == [61, 62]

    assert index.add(given[:1]).tolist() == [60]
    index.delete(np.array([60, 2]))
    index.add(given[3:4], np.array([3]), [{"n": 300}], upsert=True)
    index.add(given[:2], fields=[{"m": 1}, {}])
    check()
    index.close()
    index = open_live(path)
    check()
    index.snapshot()
    index.close()
    index = open_live(path)
    check()
    index.close()
    with pytest.raises(OutputError, match=r"holds files that are no part of an index \(live"):
        write_vectors(path, name="docs", vectors=given)
    (path / "snapshots").rename(tmp_path / "aside")
    changes, lock = (path / LIVE).rename(tmp_path / LIVE), path / "live.lock"
    lock.unlink()
    write_vectors(path, name="docs", vectors=given[::-1].copy())
    shutil.copy(changes, path / LIVE)
    with pytest.raises(ManifestError, match="holds changes of another build"):
        open_live(path)


def test_a_datastore_takes_changes(build: Build, tmp_path: Path) -> None:
    path = build()
    plain = open_index(path)
    ids = np.array([[0, 5, 16], [1, -1, 2]])
    wanted, behind = plain.payloads(ids), plain.following(ids)
    index = open_live(path)
    given = np.ones((2, 4), np.float32)
    index.add(given, np.array([100, 5]), [{"tokens": [1, 2, 3]}, {}], upsert=True)

    def check(view: Any) -> None:
        info = view.info()
        assert (info["model"], info["fingerprint"], info["tokens_per_payload"]) == ("tiny", "abc", 8)
        found = view.following(ids)
        assert found[0, 1].tolist() == [-1] * 8
        assert np.delete(found.reshape(6, 8), 1, 0).tolist() == np.delete(behind.reshape(6, 8), 1, 0).tolist()
        assert view.following(np.array([[100]])).tolist() == [[[1, 2, 3, -1, -1, -1, -1, -1]]]
        given = view.payloads(ids)
        assert given[0] == [wanted[0][0], {}, wanted[0][2]] and given[1] == wanted[1]

    check(index.view())
    index.snapshot()
    check(index.view())
    index.close()
    index = open_live(path)
    check(index.view())
    index.close()
    check(open_index(found(path)[0][1]))


def test_a_shard_holds_its_own_ids(tmp_path: Path) -> None:
    path, given = tmp_path / "docs", vectors(30)
    write_vectors(path, name="docs", vectors=given, shards=3)
    index = open_live(path / "shard-1")
    assert index.add(given[:3]).tolist() == [31, 34, 37]
    with pytest.raises(ValueError, match="id % 3 == 1"):
        index.add(given[:1], np.array([30]))
    assert index.delete(np.array([1, 2, 31])) == 2
    index.snapshot()
    index.close()
    index = open_live(path / "shard-1")
    assert index.view().state.count == 11 and index.view().info()["shards"] == 3
    index.close()
    write_vectors(tmp_path / "lists", name="docs", vectors=given, factory="IVF4,Flat", shards=2, by="list")
    with pytest.raises(ManifestError, match="is a shard by list"):
        open_live(tmp_path / "lists" / "shard-0")


def test_what_cannot_be_made_or_opened(tmp_path: Path) -> None:
    for wrong, said in (
        ({"name": "a b"}, "a name is"),
        ({"factory": "LSH"}, "no such index is served"),
        ({"factory": "IVF4,PQ5"}, "cannot hold 16 dimensions"),
        ({"metric": "l7"}, "no metric"),
        ({"dimension": 0}, "at least 1 dimension"),
    ):
        with pytest.raises(OutputError, match=said):
            create_live(tmp_path / "new", **{"name": "docs", "dimension": D, **wrong})
    assert not (tmp_path / "new").exists()
    create_live(tmp_path / "docs", name="docs", dimension=D)
    with pytest.raises(OutputError, match="is not empty"):
        create_live(tmp_path / "docs", name="docs", dimension=D)
    index = open_live(tmp_path / "docs")
    with pytest.raises(ValueError, match="holds nothing that could be written"):
        index.snapshot()
    index.close()
    with pytest.raises(ManifestError, match="no such index directory"):
        open_live(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="is no index of vectors"):
        open_live(tmp_path / "empty")
    (tmp_path / "docs" / LIVE).write_bytes(b"no database" * 1000)
    with pytest.raises(ManifestError, match="cannot be read"):
        open_live(tmp_path / "docs")
    create(tmp_path / "other", Settings("docs", D, "l2", "Flat"))
    log = Log(tmp_path / "other")
    log._writer.execute("UPDATE state SET value = 99 WHERE name = 'format'")
    log.close()
    with pytest.raises(ManifestError, match="no log of a live index that this ralmq reads"):
        Log(tmp_path / "other")
