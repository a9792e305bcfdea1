"""The calls without a coroutine, and those that torch.distributed does: the same answers, the same errors."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ralmq
import torch
from ralmq.errors import Refused
from ralmq.workers.group import distributed
from ralmq.workers.group.group import Group, SyncGroup
from worlds import cluster, member, world


def threads(url: str, size: int, act: Callable[[SyncGroup], Any], **options: Any) -> list[Any]:
    def one() -> tuple[int, Any]:
        with ralmq.group("g", size, broker=url, wait=20, timeout=20, **options) as group:
            return group.rank, act(group)

    with ThreadPoolExecutor(size) as pool:
        found = [each.result() for each in [pool.submit(one) for _ in range(size)]]
    return [made for _, made in sorted(found, key=lambda entry: entry[0])]


async def test_calls_that_return_when_they_are_done() -> None:
    def act(group: SyncGroup) -> None:
        rank, own = group.rank, np.full(3, group.rank, np.float32)
        assert (group.name, group.size) == ("g", 3)
        assert group.all_reduce(own).tolist() == [3.0] * 3
        assert (group.reduce(own, "max") is None) == (rank > 0)
        assert group.broadcast(own if rank == 2 else None, 2).tolist() == [2.0] * 3
        assert group.scatter([own, own + 1, own + 2] if rank == 0 else None).tolist() == [rank] * 3
        found = group.gather(own[:rank], 1)
        assert found is None or [len(each) for each in found] == [0, 1, 2]
        assert len(group.all_gather(own)) == 3
        assert group.reduce_scatter([own[:to] for to in range(3)]).tolist() == [3.0] * rank
        group.barrier()
        with pytest.raises(Refused, match="no operation"):
            group.all_reduce(own, "middle")

    def after(url: str) -> None:
        with ralmq.group("g", 1, broker=url, wait=20) as group:
            pass
        with pytest.raises(Refused, match="closed: open it anew"):
            group.barrier()

    async with cluster() as all_of_it:
        await asyncio.to_thread(threads, all_of_it.url, 3, act)
        await asyncio.to_thread(after, all_of_it.url)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("group-")]


async def test_errors_come_out_and_leave_no_thread() -> None:
    def act(group: SyncGroup) -> str:
        try:
            if group.rank:
                group.barrier(timeout=0.2)
        except ralmq.RankMissing as error:
            return str(error.ranks)
        return ""

    def alone(url: str) -> None:
        with pytest.raises(ralmq.RankMissing), ralmq.group("g", 2, broker=url, wait=0.2):
            pass

    async with cluster() as all_of_it:
        await asyncio.to_thread(alone, all_of_it.url)

        def both(group: SyncGroup) -> str:
            said = act(group)
            gate.wait()  # nobody leaves before
            return said

        gate = threading.Barrier(2)
        assert await asyncio.to_thread(threads, all_of_it.url, 2, both) == ["", "(0,)"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("group-")]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("backend", ["gloo", "auto"])
async def test_torch_does_the_same(size: int, backend: str) -> None:
    async def act(group: Group) -> None:
        rank = group.rank
        for count in (3, 50_000):
            given = [torch.arange(count, dtype=torch.float32) + each for each in range(size)]
            own, total = given[rank], torch.stack(given).sum(0)
            assert torch.equal(await group.all_reduce(own), total)
            assert torch.allclose(await group.all_reduce(own, "mean"), total / size)
            assert torch.equal(await group.all_reduce(own, "max"), given[-1])
            assert torch.equal(own, given[rank])
            found = await group.reduce(own, root=size - 1)
            assert torch.equal(found, total) if rank == size - 1 else found is None
            assert torch.equal(await group.broadcast(own if rank == 0 else None), given[0])
            parts = [own[: to + 1] for to in range(size)]
            assert torch.equal(await group.scatter(parts if rank == 0 else None), given[0][: rank + 1])
            assert torch.equal(await group.reduce_scatter(parts), total[: rank + 1])
            uneven = await group.all_gather(own[rank:])
            assert all(torch.equal(each, given[of][of:]) for of, each in enumerate(uneven))
            held = await group.gather(own[rank:].bfloat16(), size - 1)
            assert held is None or all(torch.equal(each, given[of][of:].bfloat16()) for of, each in enumerate(held))
        array = await group.all_reduce(np.array([[rank + 1]], np.int64), "mean")
        assert array.dtype == np.float64 and array.tolist() == [[(size + 1) / 2]]
        await group.barrier()

        for dtype in distributed.REDUCED:
            assert (await group.all_reduce(torch.ones(2, dtype=getattr(torch, dtype)), "max")).tolist() == [1, 1]
        with pytest.raises(Refused, match="does not reduce int16"):
            await group.all_reduce(torch.ones(2, dtype=torch.int16))
        await group.barrier()  # which has ended nothing

    before = dict(os.environ)
    async with cluster() as all_of_it:
        await world(all_of_it.url, size, act, backend=backend)
    assert dict(os.environ) == before


async def test_torch_calls_that_are_late_or_do_not_belong_together() -> None:
    async def late(group: Group) -> Any:
        found = []
        if group.rank != 1:
            try:
                await group.all_reduce(torch.ones(4), timeout=0.5)
            except ralmq.RankMissing as error:
                found = list(error.ranks)
        else:
            await asyncio.sleep(2.0)
        return found

    async def other(group: Group) -> Any:
        with pytest.raises(Refused, match="same calls in the same order"):
            await group.all_reduce(torch.ones(4 + group.rank))
        return True

    async with cluster() as all_of_it:
        assert await world(all_of_it.url, 3, late, backend="gloo") == [[1], [], [1]]
        assert await world(all_of_it.url, 2, other, backend="gloo") == [True, True]
        with pytest.raises(Refused, match="each member needs a GPU of its own"):
            await world(all_of_it.url, 2, other, backend="nccl")


async def test_nccl_without_a_gpu_is_refused_before_anyone_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after a wait for the others: there is no broker, even."""
    monkeypatch.setattr(distributed, "gpu", lambda: "")
    met: list[Any] = []
    monkeypatch.setattr("ralmq.workers.group.group.meet", lambda *given, **options: met.append(given))
    with pytest.raises(Refused, match=r"backend nccl: this process sees no GPU, .* or use gloo"):
        async with ralmq.group("alone", 2, broker="tcp://127.0.0.1:9", backend="nccl"):
            raise AssertionError("it has opened")
    assert not met


async def test_one_that_dies_before_torch_has_connected_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for torch, which waits for it; and the folder of the meeting is gone."""
    connect = distributed.Distributed.connect

    async def dying(self: Any, *where: Any) -> None:
        if self._mesh.rank == 1:
            raise KeyError("the end")
        await connect(self, *where)

    async def act(group: Group) -> None:
        raise AssertionError("it has opened")

    monkeypatch.setattr(distributed.Distributed, "connect", dying)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with cluster() as all_of_it:
        members = [member(all_of_it.url, 2, act, rank, backend="gloo", wait=3.0) for rank in range(2)]
        found = await asyncio.wait_for(asyncio.gather(*members, return_exceptions=True), 10)
    assert isinstance(found[0], ralmq.RankLost) and found[0].ranks == (1,), found[0]
    assert not list(tmp_path.iterdir())
    for thread in [thread for thread in threading.enumerate() if thread.name == "connecting"]:
        await asyncio.to_thread(thread.join, 20)  # torch gives up after `wait`


@pytest.fixture
def opened_before() -> None:
    """The first store of a process leaves a pipe behind in torch, later ones nothing."""
    apart: Any = torch.distributed
    apart.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)


@pytest.mark.usefixtures("opened_before")
async def test_torch_over_several_hosts_meets_by_a_port_that_members_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = distributed.opened

    async def apart(mesh: Any, backend: str, hosts: list[str], *more: Any) -> Any:
        return await opened(mesh, backend, [f"host {rank}" for rank in range(len(hosts))], *more)

    async def act(group: Group) -> list[float]:
        total: list[float] = (await group.all_reduce(torch.full((3,), group.rank + 1.0))).tolist()
        return total

    monkeypatch.setattr(distributed, "opened", apart)
    monkeypatch.delenv(distributed.INTERFACE, raising=False)
    async with cluster() as all_of_it:
        assert await world(all_of_it.url, 3, act, backend="gloo", address="127.0.0.1") == [[6.0] * 3] * 3
