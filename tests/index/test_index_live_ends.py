"""What is left of a live index when something ends: the index itself, a snapshot's writer, an asker, a search."""

import asyncio
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import cluster
from live_state import D, made, vectors
from ralmq.schema.errors import DeadlineExceeded, WorkerFailed
from ralmq.workers.index.query import BadQuery, Params
from ralmq.workers.live import live, snapshot
from ralmq.workers.live.opening import create_live, open_live
from ralmq.workers.search import worker as search_worker
from ralmq.workers.search.answer import Asked, answer, answers
from ralmq.workers.search.recall import WAITING, Recall
from ralmq.workers.search.worker import Index


def test_the_end_is_found_behind_a_full_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "GROUP", 4)
    index = made(tmp_path)
    closing = threading.Thread(target=index.close, daemon=True)
    with index._changing:  # the writer waits with what it took
        first = index.submit(index.room.add(vectors(1)))
        while not index._asked.empty():
            pass
        others = [index.submit(index.room.add(vectors(1))) for _ in range(4)]
        closing.start()
        while not index._closed:
            pass
    closing.join(10)
    assert not closing.is_alive()
    assert [change.done.result(1).tolist() for change in (first, *others)] == [[0], [1], [2], [3], [4]]
    with pytest.raises(WorkerFailed, match="is closed"):
        index.submit(index.room.add(vectors(1)))


def test_what_a_killed_snapshot_left_is_removed(tmp_path: Path) -> None:
    index = made(tmp_path)
    index.add(vectors(3))
    left = tmp_path / snapshot.FOLDER / f".{1:020d}.abcdefgh" / "new"
    left.mkdir(parents=True)
    (left / "index.faiss").write_bytes(b"half")
    version = index.snapshot()
    assert [path.name for path in (tmp_path / snapshot.FOLDER).iterdir()] == [f"{int(version.split('-')[1]):020d}"]
    index.close()


def test_samples_that_wait_keep_few_states(tmp_path: Path) -> None:
    """Each holds the state that answered it, and with it segments that were merged away since."""
    index, params, query = made(tmp_path), Params(k=1), vectors(1)
    recall = Recall(1, 0, None, 0, False)
    for _ in range(2 * WAITING):
        index.add(query)
        view = index.view()
        recall.offer(view, params, query, view.search(query, params))
    del view
    gc.collect()
    assert len(index._views) <= 65
    index.close()


def test_a_sample_that_fails_is_the_only_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        nlist = 0

        def search(self, *args: Any) -> Any:
            raise OSError("the disk is gone")

    index, params, query = made(tmp_path), Params(k=1), vectors(1)
    index.add(query)
    view = index.view()
    found = view.search(query, params)
    recall = Recall(1, 0, None, 0, False)
    broken: Any = Broken()
    recall.offer(broken, params, query, found)
    recall.offer(view, params, query, found)
    recall.start()
    for _ in range(1000):
        if recall.gauges:
            break
        threading.Event().wait(0.01)
    recall.stop()
    assert recall.gauges == {"recall": 1.0, "recall_queries": 1}
    assert "could not be repeated" in caplog.text
    index.close()


def test_a_version_that_nobody_waited_for_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        create_live(tmp_path / name, name="docs", dimension=D)
    go, opened, real = threading.Event(), [], search_worker.open_source

    def slow(path: Path, **how: Any) -> Any:
        go.wait(10)
        opened.append(real(path, **how))
        return opened[-1]

    async def main() -> None:
        async with cluster(Index(index=tmp_path / "a"), inproc=True) as running:
            client = await running.client()
            monkeypatch.setattr(search_worker, "open_source", slow)
            with pytest.raises(DeadlineExceeded):
                await client.use("docs", tmp_path / "b", deadline=0.2)
            await running.idle()
            go.set()
            async with asyncio.timeout(20):
                while not opened or not opened[0]._closed:
                    await asyncio.sleep(0.01)
            await client.use("docs", tmp_path / "b")
            assert (await client.add("docs", vectors(1))).tolist() == [0]
        index = open_live(tmp_path / "b")
        assert index.view().state.has(np.array([0])).all()
        index.close()

    asyncio.run(main())


def test_a_goal_is_reached_though_lists_come_later(tmp_path: Path) -> None:
    index = made(tmp_path, "IVF16,Flat")
    recall = Recall(1, 0.6, None, index.view().nlist, False)
    queries = vectors(200, 1)

    def searched() -> None:
        view = index.view()
        for start in range(0, len(queries), 20):
            asked = Asked({"k": 5}, [queries[start : start + 20]])
            answers(view, [asked], effort=recall.effort, seen=lambda *seen: recall.offer(view, *seen))
            while recall.step():
                pass

    index.add(vectors(20))
    searched()
    assert recall.effort is None and recall.gauges == {"recall": 1.0, "recall_queries": 200}
    index.add(vectors(2000, 2))
    index.settle()
    searched()
    assert index.view().nlist == 16 and recall.rungs[-1] == 16
    assert recall.effort is not None and recall.gauges["nprobe"] == recall.effort and recall.gauges["recall"] >= 0.6
    index.close()


def test_shards_that_began_empty_have_lists_of_their_own(tmp_path: Path) -> None:
    """Each trains by itself: lists that were chosen with the centroids of one mean something else to the others."""
    create_live(tmp_path / "docs", name="docs", dimension=D, factory="IVF4,Flat", shards=2)
    for shard in range(2):
        index = open_live(tmp_path / "docs" / f"shard-{shard}")
        index.add(vectors(400, shard))
        index.settle()
        view = index.view()
        assert view.nlist == 4 and answer(view, {"k": 3, "nprobe": 2}, [vectors(2)])[1][0].min() >= 0
        chosen = [np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float32)]
        for body, arrays in (
            ({"quantizer": True}, []),
            ({"assign": True, "nprobe": 1}, [vectors(2)]),
            ({"lists": True}, [vectors(2), *chosen]),
        ):
            with pytest.raises(BadQuery, match="has lists of its own"):
                answer(view, body, arrays)
        index.close()
