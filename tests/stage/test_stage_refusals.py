"""What a stage refuses, in one line that says what to do, and what a bad index or a bad reply of one does."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ralmq.errors import DeadlineExceeded, RalmqError, Refused, WorkerFailed
from ralmq.schema.tensor import tensor_of
from ralmq.workers.base import Answer, Request, Worker
from ralmq.workers.options import build
from ralmq.workers.registry import find
from ralmq.workers.stage.neighbours import Query, neighbours_of
from ralmq.workers.stage.ranks import check_device
from ralmq.workers.stage.worker import Stage
from stage.pipelines import MODEL, Cluster, cluster, generated, prompts, scored, stages

FAMILY, CONTEXT, VOCAB, D = "llama", 256, 128, 64


def served(path: Path, body: Callable[[Cluster], Any], count: int = 2, **options: Any) -> None:
    async def main() -> None:
        async with cluster(*stages(path, count, **options)) as running:
            await body(running)
            await running.settled()

    asyncio.run(main())


def test_wrong_requests_are_refused_before_any_computation(checkpoint: Callable[[str], Path]) -> None:
    ids = np.array([5, 6, 7], np.int32)
    wrong: list[tuple[dict[str, Any], list[Any], str]] = [
        ({}, [], "0 tensors came with the request: send one"),
        ({}, [ids, ids], "2 tensors came"),
        ({}, [ids.astype(np.float32)], r"the prompt is float32 \[3\]: send ids, int32"),
        ({}, [ids[None]], r"the prompt is int32 \[1, 3\]"),
        ({}, [ids[:0]], "the prompt has 0 tokens: give at least 1"),
        ({"mode": "score"}, [ids[:1]], "the prompt has 1 tokens: give at least 2"),
        ({}, [np.array([5, VOCAB], np.int32)], "ids outside 0..127: use the tokenizer of this model"),
        ({}, [np.array([-1], np.int32)], "ids outside"),
        ({}, [np.zeros(CONTEXT, np.int32)], "has 256 tokens, the model's context holds 256: shorten it by at least 1"),
        ({"mode": "score"}, [np.zeros(CONTEXT + 2, np.int32)], "context holds 256: shorten it by at least 1"),
        ({"prompt": 4}, [ids], "prompt=4 is more than the 3 tokens"),
        ({"prompt": 0}, [ids], "prompt: Input should be greater"),
        ({"stop_ids": [VOCAB]}, [ids], "stop_ids has ids outside 0..127: use those of"),
        ({"max_tokens": 0}, [ids], "max_tokens: Input should be greater"),
        ({"temperature": float("nan")}, [ids], "temperature: "),
        ({"top_p": 0.0}, [ids], "top_p: "),
        ({"seed": -1}, [ids], "seed: "),
        ({"colour": 1}, [ids], "unknown option colour: there are max_tokens, temperature"),
        ({"retrieve": {"k": 3}}, [ids], "retrieve.index: Field required"),
        ({"retrieve": {"index": "i", "interval": 0}}, [ids], "retrieve.interval: "),
        ({"retrieve": {"index": "i", "staleness": 8}}, [ids], "retrieve.staleness: "),
        ({"retrieve": {"index": "i", "knn_temperature": 0.0}}, [ids], "retrieve.knn_temperature: "),
    ]

    async def body(running: Cluster) -> None:
        for task, tensors, said in wrong:
            with pytest.raises(Refused, match=said):
                await running.client.request(f"lm:{MODEL}", task, tensors=tensors)
        assert [host.worker._runner.steps for host in running.hosts] == [0, 0]  # type: ignore[attr-defined]

    served(checkpoint(FAMILY), body)


def test_the_whole_context_can_be_used(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster) -> None:
        ids = np.random.default_rng(0).integers(0, VOCAB, CONTEXT + 1).tolist()
        assert len((await generated(running.client, ids[: CONTEXT - 1], max_tokens=50)).tokens) == 1
        whole = await generated(running.client, ids[:10], max_tokens=1 << 20)
        assert len(whole.tokens) == CONTEXT - 10 and whole.final["finish_reason"] == "length"
        hidden, log_p = await scored(running.client, ids)
        assert hidden.shape == (CONTEXT, D) and log_p.shape == (CONTEXT,)

    served(checkpoint(FAMILY), body)


def test_more_than_the_kv_cache_holds_is_refused(checkpoint: Callable[[str], Path]) -> None:
    """1 MiB of a span of all 4 layers is 64 blocks; one row's worth of context is 16."""

    async def body(running: Cluster) -> None:
        leader = running.hosts[0].worker
        assert isinstance(leader, Stage) and leader.span is not None and leader.span.kv_blocks == 16
        assert len((await generated(running.client, [3], max_tokens=255)).tokens) == 255
        running.hosts[0].worker._leader.memory.blocks = 8  # type: ignore[attr-defined]
        with pytest.raises(Refused, match=r"need 16 KV blocks of 16 tokens, the pipeline has 8: ask for fewer tokens"):
            await generated(running.client, [3], max_tokens=255)
        running.hosts[0].worker._leader.memory.blocks = 16  # type: ignore[attr-defined]

    served(checkpoint(FAMILY), body, count=1, max_rows=1, kv_mib=1)


def test_options(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint(FAMILY)
    stage = build(find("stage"), [f"model={path}", "layers=1:3", "name=x", "threads=2", "capacity=7"])
    asyncio.run(stage.start())
    span = stage.span
    assert span is not None and (span.model, span.first, span.last, span.layers) == ("x", 1, 3, 4)
    assert stage.capacity == 7 and span.context == CONTEXT and stage.services == ()
    asyncio.run(stage.stop())
    (tmp_path / "empty").mkdir()
    for options, said in (
        ({"model": str(tmp_path / "none"), "stage": "0/1"}, "none"),
        ({"model": str(tmp_path / "empty"), "stage": "0/1"}, "config.json"),
        ({}, "needs either -o stage=0/2"),
        ({"stage": "0/1", "layers": "0:4"}, "needs either"),
        ({"stage": "2/2"}, "stage=2/2 does not exist: the model's 4 layers split into 1 to 4 stages"),
        ({"stage": "0/5"}, "split into 1 to 4 stages"),
        ({"stage": "a/b"}, "a/b is not of the form stage=0/2"),
        ({"layers": "2:2"}, "layers 2:2 do not exist"),
        ({"layers": "0:5"}, "has 4 layers, 0:4"),
        ({"stage": "0/1", "threads": 0}, "threads=0 is too small"),
        ({"stage": "0/1", "max_rows": 0}, "max_rows=0 is too small"),
        ({"stage": "0/1", "max_rows": 5000}, "max_rows=5000 is too large: give at most 4096"),
    ):
        with pytest.raises(Refused, match=said):
            Stage(**{"model": str(path), **options})
    for options, said in (
        ({"dtype": "int3"}, "dtype int3 is unknown: give one of fp32, bf16, fp16"),
        ({"device": "cuda:77"}, "device=cuda:77 cannot be used: .*; give"),
        ({"device": "cuda:77", "tp": 2}, "device=cuda:77 cannot be used: .*; give"),
        ({"device": "cuda:x"}, "device=cuda:x is no device: give cpu, cuda or cuda:1"),
        ({"device": "gpu"}, "device=gpu is none that torch can use here: give cpu, cuda or cuda:1"),
    ):
        with pytest.raises(Refused, match=said):
            asyncio.run(Stage(model=str(path), stage="0/1", **options).start())


@pytest.mark.parametrize(
    ("device", "size", "said"),
    [
        ("cuda", 1, ""),
        ("cuda:1", 1, ""),
        ("cuda", 2, ""),
        ("cuda:2", 1, "cuda:2 of 2 CUDA devices"),
        ("cuda", 4, "cuda:0 to cuda:3 of 2 CUDA devices"),
        ("cuda:1", 2, "cuda:1 to cuda:2 of 2 CUDA devices"),
    ],
)
def test_the_devices_of_all_ranks_are_there(device: str, size: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if not said:
        check_device(device, size)
        return
    with pytest.raises(Refused, match=said):
        check_device(device, size)


def test_without_a_device_of_cuda_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, said in ((None, "the torch installed here has no CUDA"), ("12.8", "torch sees no CUDA device here")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(Refused, match=f"device=cuda cannot be used: {said}; give device=cpu"):
            check_device("cuda")


QUERY = Query("i", 3, None, True, keys=[(bytes(16), 0), (bytes(16), 1)], positions=[4, 5])
IDS = np.array([[4, 5, -1], [7, 8, 9]], np.int64)
DISTANCES = np.array([[0.5, 1.0, np.inf], [1.0, 2.0, 3.0]], np.float32)
FOLLOWING = np.arange(48, dtype=np.int32).reshape(2, 3, 8)
PAYLOADS = [[{"document": "a"}, {"document": "b"}, {}], [{}, {}, {"document": "c"}]]


def test_the_reply_of_an_index() -> None:
    arrays = tuple(map(tensor_of, (IDS, DISTANCES, FOLLOWING)))
    first, second = neighbours_of(QUERY, {"payloads": PAYLOADS}, arrays)
    assert first.distances.tolist() == DISTANCES[0].tolist() and np.array_equal(second.following, FOLLOWING[1])
    assert first.passages == [{"document": "a", "id": 4, "distance": 0.5}, {"document": "b", "id": 5, "distance": 1.0}]
    assert [passage["id"] for passage in second.passages] == [7, 8, 9]
    for payloads in (None, 5, [], PAYLOADS[:1], [PAYLOADS[0], 5], [PAYLOADS[0], [{}, {}]], [PAYLOADS[0], [{}, {}, 1]]):
        with pytest.raises(WorkerFailed, match="without a payload for each neighbour"):
            neighbours_of(QUERY, {"payloads": payloads}, arrays)
    for wrong in (
        (IDS, DISTANCES),
        (IDS[:1], DISTANCES[:1], FOLLOWING[:1]),
        (IDS, DISTANCES, FOLLOWING[:, :, :1]),
        (IDS, DISTANCES[:, :2], FOLLOWING),
        (IDS, IDS, FOLLOWING),
        (IDS, DISTANCES, FOLLOWING.astype(np.float32)),
    ):
        with pytest.raises(WorkerFailed, match="answered in another shape"):
            neighbours_of(QUERY, {"payloads": PAYLOADS}, tuple(map(tensor_of, wrong)))


class Broken(Worker):
    """An index that says the right things of itself, and then answers nonsense, fails, or is gone."""

    capacity = 8

    def __init__(self, name: str, info: dict[str, Any], answers: Callable[[Request], Answer]) -> None:
        self.service = f"search:{name}"
        self._info = info
        self._answers = answers

    async def handle(self, request: Request) -> Answer:
        return self._info if request.body.get("info") else self._answers(request)


def raising(request: Request) -> Answer:
    raise OSError("disk gone")


def foreign(request: Request) -> Answer:
    """Neighbours whose tokens belong to a larger vocabulary."""
    shape = len(request.tensors[0].numpy()), request.body["k"]
    return {}, [np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.full((*shape, 8), 30_000, np.int32)]


def test_an_index_that_fails_ends_its_own_rows_alone(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster) -> None:
        leader = running.hosts[0].worker
        assert isinstance(leader, Stage) and leader._loaded is not None
        info = {"fingerprint": leader._loaded.fingerprint, "d": D, "metric": "l2"}
        gone = Broken("gone", info, raising)
        answers = {"raises": raising, "foreign": foreign, "mute": lambda _: ({}, [])}
        await running.add(gone, *[Broken(name, info, answer) for name, answer in answers.items()])
        wanted: list[tuple[str, type[RalmqError], str]] = [
            ("raises", WorkerFailed, "disk gone"),
            ("foreign", WorkerFailed, "token 30000 is outside the vocabulary of 128"),
            ("mute", WorkerFailed, "search:mute answered in another shape"),
        ]
        tasks = [generated(running.client, p, max_tokens=20) for p in prompts(3)]
        tasks += [generated(running.client, [9], max_tokens=20, retrieve={"index": name}) for name, _, _ in wanted]
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [len(end.tokens) for end in ends[:3]] == [20] * 3  # type: ignore[union-attr]
        for end, (_, kind, said) in zip(ends[3:], wanted, strict=True):
            assert isinstance(end, kind) and said in end.message
        await running.settled()
        with pytest.raises(WorkerFailed, match="disk gone"):
            await generated(running.client, [9], max_tokens=20, retrieve={"index": "gone"})
        await running.kill(gone)  # what it said of itself is still believed, so that the rows ask it
        begun = generated(running.client, [9], max_tokens=20, retrieve={"index": "gone"}, deadline=1.0)
        with pytest.raises(DeadlineExceeded):  # it waits for the index to come back, as long as it may
            await begun

    served(checkpoint(FAMILY), body)
