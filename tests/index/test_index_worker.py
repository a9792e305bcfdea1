"""The worker `index` behind a real broker, in one process."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from ralmq.broker.server import Server
from ralmq.client.client import Client, connect
from ralmq.schema.errors import Refused
from ralmq.schema.tensor import tensor_of
from ralmq.workers.base import Request, Worker
from ralmq.workers.host import Host
from ralmq.workers.index.manifest import ManifestError
from ralmq.workers.index.query import Params
from ralmq.workers.index.store import open_index
from ralmq.workers.options import build as options
from ralmq.workers.registry import find
from ralmq.workers.search import worker as module
from ralmq.workers.search.answer import answers
from ralmq.workers.search.worker import Index

QUERIES = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)


@asynccontextmanager
async def serving(*workers: Index) -> AsyncIterator[Client]:
    context: zmq.Context[Any] = zmq.Context()
    async with Server("inproc://index", context=context):
        hosts = [Host(worker, "inproc://index", context=context) for worker in workers]
        for host in hosts:
            await host.open()
        async with connect("inproc://index", context=context) as client:
            yield client
        for host in hosts:
            await host.close()
    await asyncio.to_thread(context.term)


def test_a_client_searches_it(build: Callable[..., Path]) -> None:
    path = build()

    async def main() -> None:
        async with serving(Index(index=path), Index(index=path, name="other", threads=2)) as client:
            wanted = open_index(path)
            for service in ("docs", "other"):
                hits = await client.search(service, QUERIES, k=5)
                ids, distances = wanted.search(QUERIES, Params(5))
                assert hits.ids.tolist() == ids.tolist() and hits.distances.tolist() == distances.tolist()
                assert [row[0]["tokens"] for row in hits.payloads] == [
                    passage.tokens.tolist() for passage in wanted.passages(ids[:, 0]) if passage is not None
                ]
            info = await client.request("search:docs", {"info": True})
            assert (info.body["d"], info.body["fingerprint"], info.body["ntotal"]) == (4, "abc", 17)
            reply = await client.request("search:docs", {"k": 2, "following": True}, tensors=[QUERIES])
            assert reply.tensors[2].numpy().tolist() == wanted.following(wanted.search(QUERIES, Params(2))[0]).tolist()

    asyncio.run(main())


def test_a_bad_query_is_refused_and_the_next_one_served(build: Callable[..., Path]) -> None:
    path = build()

    async def main() -> None:
        async with serving(Index(index=path)) as client:
            with pytest.raises(Refused, match=r"the index docs wants \[m, 4\]"):
                await client.search("docs", QUERIES[:, :3], k=5)
            answers = await asyncio.gather(*(client.search("docs", QUERIES, k=k) for k in range(1, 18)))
            assert [answer.ids.shape for answer in answers] == [(3, k) for k in range(1, 18)]

    asyncio.run(main())


def test_the_loop_turns_while_it_searches(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The search waits for something that only the loop can do."""
    path, turned = build(), threading.Event()

    def waiting(*given: Any, **how: Any) -> Any:
        assert turned.wait(10)
        return answers(*given, **how)

    monkeypatch.setattr(module, "answers", waiting)

    async def main() -> None:
        worker = Index(index=path)
        await worker.start()
        asyncio.get_running_loop().call_later(0.01, turned.set)
        body, arrays = await worker.handle(Request("search:docs", {"k": 2}, [tensor_of(QUERIES)]))
        assert body.keys() == {"version"} and arrays[0].shape == (3, 2)
        await worker.stop()

    asyncio.run(main())


async def services(worker: Worker) -> tuple[str, ...]:
    await worker.start()
    await worker.stop()
    return worker.services


def test_options(build: Callable[..., Path], tmp_path: Path) -> None:
    path = build()
    worker = options(find("index"), [f"index={path}", "name=mine", "threads=2"])
    assert asyncio.run(services(worker)) == ("search:mine",) and worker.idempotent
    for pairs, said in (
        ([], "needs -o index="),
        ([f"index={path}", "name=a b"], "a name is"),
        ([f"index={path}", "threads=0"], "give at least 1"),
        ([f"index={path}", "shard=4/4"], "give the shard and how many there are"),
        ([f"index={path}", "shard=first"], "give the shard and how many there are"),
        ([f"index={path}", "batch=0"], "give at least 1"),
        ([f"index={path}", "nprobe=-1"], "give at least 0"),
        ([f"index={path}", "wait_ms=nan"], "give 0 to 1000 milliseconds"),
        ([f"index={path}", "recall=1.5"], "give 0 to 1"),
        ([f"index={path}", "recall_goal=nan"], "give 0 to 1"),
    ):
        with pytest.raises(Refused, match=said):
            options(Index, pairs)
    with pytest.raises(Refused, match="holds shard 0 of 1; mend -o shard"):
        asyncio.run(Index(index=path, shard="0/4").start())
    with pytest.raises(ManifestError, match="no such index directory"):
        asyncio.run(Index(index=tmp_path / "none").start())
