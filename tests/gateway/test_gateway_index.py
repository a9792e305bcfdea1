"""RALM's clients over the index server itself."""

import asyncio
from pathlib import Path

import faiss
import numpy as np
import pytest
from gateway.ralm import NLIST, NPROBE, VECTORS, B, Caller, D, K, queries, request, request_with_lists
from inprocess import cluster
from ralmq.workers.gateway import RalmGateway
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.search.worker import Index
from serving import until


@pytest.mark.parametrize("factory", [f"IVF{NLIST},Flat", f"IVF{NLIST},SQ8"])
def test_both_requests_are_answered_as_faiss_answers(tmp_path: Path, factory: str) -> None:
    write_vectors(tmp_path / "docs", name="docs", vectors=VECTORS, factory=factory)
    index = faiss.read_index(str(tmp_path / "docs" / "index.faiss"))
    index.nprobe = NPROBE
    asked = queries(1)
    distances, ids = index.search(asked, K)
    chosen = index.quantizer.search(asked, NPROBE)[1]
    plain, listed = request(asked), request_with_lists(asked, chosen)
    assert (len(plain), len(listed), B, D) == (65_540, 73_744, 32, 512)

    async def main() -> None:
        given = {"index": "docs", "server_port": 0, "coordinator_port": 0, "k": K, "nprobe": NPROBE}
        gates = [RalmGateway(**given, lists=lists) for lists in (False, True)]  # type: ignore[arg-type]
        async with cluster(Index(index=tmp_path / "docs"), *gates, inproc=True):
            await until(lambda: all(server.is_serving() for gate in gates for server in gate._servers))
            for gate, raw in zip(gates, (plain, listed), strict=True):
                for coordinator in (False, True):
                    async with Caller(gate.ports[coordinator], coordinator=coordinator) as caller:
                        found = await caller.ask(raw)
                        assert np.array_equal(found[1], distances)
                        alone = [len(set(row)) == K for row in distances.tolist()]
                        assert any(alone) and np.array_equal(found[0][alone], ids[alone])

    asyncio.run(main())
