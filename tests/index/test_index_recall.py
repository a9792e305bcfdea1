"""The recall gauge against offline recall, and an nprobe or ef that reaches a goal."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from ralmq.schema.message import Beat
from ralmq.schema.tensor import tensor_of
from ralmq.workers.base import Request
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.search.answer import Asked, answer, answers
from ralmq.workers.search.recall import WAITING, Recall
from ralmq.workers.search.worker import Index

RNG = np.random.default_rng(6)
VECTORS = RNG.normal(size=(5000, 12)).astype(np.float32)
QUERIES = RNG.normal(size=(2000, 12)).astype(np.float32)


@pytest.fixture(scope="module", params=[("IVF64,Flat", "l2"), ("IVF64,SQ8", "ip"), ("HNSW8", "l2")])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OpenIndex:
    out = tmp_path_factory.mktemp("recall") / "v"
    factory, metric = request.param
    write_vectors(out, name="v", vectors=VECTORS, factory=factory, metric=metric)
    return open_index(out)


def offline(index: OpenIndex, effort: int) -> float:
    name = "nprobe" if index.nlist else "ef"
    found = answer(index, {"k": 10, name: effort}, [QUERIES])[1][0]
    wanted = answer(index, {"k": 10, "exact": True}, [QUERIES])[1][0]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]))


def served(index: OpenIndex, recall: Recall, step: int = 20, **body: int) -> None:
    """Answers all queries, and repeats what was sampled after each request."""
    for start in range(0, len(QUERIES), step):
        asked = [Asked({"k": 10, **body}, [QUERIES[start : start + step]])]
        answers(index, asked, effort=recall.effort, seen=lambda *seen: recall.offer(index, *seen))
        while recall.step():
            pass


@pytest.mark.parametrize("effort", [2, 12])
def test_the_gauge_is_the_offline_recall(index: OpenIndex, effort: int) -> None:
    recall = Recall(0.25, 0, effort, index.nlist, not index.nlist)
    served(index, recall)
    assert 350 < recall.gauges["recall_queries"] <= 512
    assert abs(recall.gauges["recall"] - offline(index, effort)) < 0.02


def test_a_goal_is_reached_from_the_least_effort(index: OpenIndex) -> None:
    recall = Recall(0.05, 0.95, 1, index.nlist, not index.nlist)
    assert offline(index, 1) < 0.9
    served(index, recall)
    assert recall.effort is not None and recall.effort > 1
    real = offline(index, recall.effort)
    assert real >= 0.95 and abs(recall.gauges["recall"] - real) < 0.02
    lower = recall.rungs[max(0, recall.rungs.index(recall.effort) - 3)]
    assert offline(index, lower) < 0.95, "no more effort than it takes"


def test_effort_falls_where_less_is_enough(index: OpenIndex) -> None:
    recall = Recall(0.05, 0.5, recall_rung := 48 if index.nlist else 1024, index.nlist, not index.nlist)
    served(index, recall)
    assert recall.effort is not None and recall.effort < recall_rung and offline(index, recall.effort) >= 0.5


def test_a_request_that_names_its_own_changes_nothing(index: OpenIndex) -> None:
    recall = Recall(0.2, 0.99, 1, index.nlist, not index.nlist)
    served(index, recall, **{"nprobe" if index.nlist else "ef": 2})
    assert recall.effort == 1 and recall.gauges["recall_queries"] > 200


def test_what_waits_is_bounded(index: OpenIndex) -> None:
    recall = Recall(1, 0, None, index.nlist, False)
    answers(index, [Asked({}, [QUERIES])], seen=lambda *seen: recall.offer(index, *seen))
    count = 0
    while recall.step():
        count += 1
    assert count == WAITING


def test_nothing_is_sampled_where_nothing_is_asked_for(index: OpenIndex) -> None:
    recall = Recall(0, 0, None, index.nlist, False)
    served(index, recall, step=1000)
    assert "recall" not in recall.gauges


def test_rungs() -> None:
    assert Recall(0, 0, None, 20, False).rungs == (1, 2, 3, 4, 6, 8, 12, 16, 20)
    assert Recall(0, 0, None, 1, False).rungs == (1,)
    assert Recall(0, 0, None, 0, False).rungs == ()


def test_the_worker_shows_it(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS[:500], factory="IVF8,Flat")

    async def main() -> None:
        worker = Index(index=tmp_path / "v", recall=1, nprobe=8)
        await worker.start()
        await worker.handle(Request("search:v", {"k": 3}, [tensor_of(QUERIES[:5])]))
        async with asyncio.timeout(20):
            while worker.beat(Beat()).gauges.get("recall_queries") != 5:
                await asyncio.sleep(0.01)
        gauges = worker.beat(Beat()).gauges
        assert gauges == {"searches": 1, "calls": 1, "recall": 1.0, "recall_queries": 5, "nprobe": 8}
        await worker.stop()

    asyncio.run(main())
