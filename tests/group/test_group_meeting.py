"""How members find each other: ranks, who is missing, who does not belong there, and what a death leaves."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ralmq
from inprocess import PACE, Cluster
from ralmq.broker.server import Server
from ralmq.errors import NoBroker, Refused
from ralmq.schema.message import Direct
from ralmq.workers.base import Request
from ralmq.workers.direct import lane
from ralmq.workers.group.errors import RankLost, RankMissing
from ralmq.workers.group.group import Group, group
from ralmq.workers.group.meeting import Meeting, Member, Table
from ralmq.workers.group.mesh import Mesh
from serving import until
from worlds import cluster, member, opened, world


async def ranks(own: Group) -> int:
    await own.barrier()
    return own.rank


async def come(found: Cluster, count: int) -> None:
    """Returns once so many have come to the meeting of g: one holds it, the others ask."""
    peers = found.server.core.roster.peers

    async def here() -> bool:
        return sum(peer.load for peer in peers.values() if "group:g" in peer.hello.services) == count - 1

    await until(here, f"{count} members")


async def test_ranks_are_those_asked_for_and_else_by_who_comes_first() -> None:
    async with cluster() as all_of_it:
        members = []
        for number, rank in enumerate([None, 2, None, 0]):
            members.append(asyncio.create_task(member(all_of_it.url, 4, ranks, rank)))
            if number < 3:
                await come(all_of_it, number + 1) if number else await until(lambda: all_of_it.in_flight())
        assert await asyncio.gather(*members) == [1, 2, 3, 0]


async def test_one_group_after_another_and_two_at_once() -> None:
    async with cluster() as all_of_it:

        async def act(own: Group) -> int:
            return int((await own.all_reduce(np.array([own.rank])))[0])

        for turn in range(6):
            assert await world(all_of_it.url, 3, act) == [3] * 3, turn

        async def named(name: str) -> list[Any]:
            async def one() -> Any:
                async with group(name, 2, broker=all_of_it.url, wait=20) as own:
                    return await own.all_gather(np.array([len(name)]))

            return [int(each[0]) for found in await asyncio.gather(one(), one()) for each in found]

        assert await asyncio.gather(named("a"), named("bb")) == [[1] * 4, [2] * 4]
        await all_of_it.idle()
        services = all_of_it.server.core.requests.services
        assert not [name for name, service in services.items() if name.startswith("group:") and service.offers]


async def test_those_who_do_not_come_are_named_in_time() -> None:
    async with cluster() as all_of_it:
        url = all_of_it.url
        found = await asyncio.gather(
            *[member(url, 4, ranks, rank, wait=0.5) for rank in (0, 2)], return_exceptions=True
        )
        for error in found:
            assert isinstance(error, RankMissing) and error.ranks == (1, 3)
            assert "ranks 1 and 3 of 4 did not come within 0.5 s" in str(error)
        with pytest.raises(RankMissing) as told:
            await member(url, 3, ranks, wait=0.3)
        assert told.value.ranks == (1, 2)
        assert await world(url, 2, ranks) == [0, 1], "the name is free again"


@pytest.mark.parametrize("dies", [0, 1])
async def test_one_that_dies_while_they_meet_may_come_again(dies: int) -> None:
    """Whether it held the meeting or was one of those who had come."""
    async with cluster() as all_of_it:
        url = all_of_it.url
        first = asyncio.create_task(member(url, 3, ranks, 0))
        await until(lambda: all_of_it.in_flight())
        second = asyncio.create_task(member(url, 3, ranks, 1))
        await come(all_of_it, 2)
        (first, second)[dies].cancel()
        await asyncio.wait([(first, second)[dies]])
        others = [asyncio.create_task(member(url, 3, ranks, rank)) for rank in (dies, 2)]
        assert sorted(await asyncio.gather((first, second)[1 - dies], *others)) == [0, 1, 2]


async def test_one_whose_time_is_up_as_the_last_one_comes_is_a_member() -> None:
    """The others count on it."""
    direct = Direct("host", "", "near", "")
    meeting = Meeting("g", Member(0, direct, {"world_size": 3}, {}))
    body = {"rank": 1, "direct": list(direct), "terms": {"world_size": 3}, "facts": {}, "within": 0.05}
    answer = asyncio.create_task(meeting.handle(Request("group:g", body)))
    await asyncio.sleep(0)
    time.sleep(0.1)  # both in one turn of the loop
    meeting._came.append(Member(2, direct, {"world_size": 3}, {}))
    meeting._look()
    assert (await answer)["rank"] == 1


async def test_a_group_that_was_left_is_not_used_any_more() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 2) as groups:
        await groups[0].close()
        with pytest.raises(Refused, match="the group is not open"):
            await groups[0].barrier()
        await groups[0].close()


async def test_who_does_not_belong_there_is_refused_and_the_others_go_on() -> None:
    async with cluster() as all_of_it:
        url = all_of_it.url
        first = asyncio.create_task(member(url, 2, ranks, 0))
        await until(lambda: all_of_it.in_flight())
        with pytest.raises(Refused, match="world_size is 2 for those who are here, 3 for this one"):
            await member(url, 3, ranks)
        with pytest.raises(Refused, match="backend is 'direct' for those who are here, 'gloo' for this one"):
            await member(url, 2, ranks, backend="gloo")
        with pytest.raises(Refused, match="rank 0 has come already"):
            await member(url, 2, ranks, 0)
        client = await all_of_it.client()
        for body in ({}, {"rank": 1, "direct": [], "terms": {}, "facts": {}, "within": 1}):
            with pytest.raises(Refused):
                await client.request("group:g", body)
        assert await member(url, 2, ranks) == 1
        assert await first == 0


async def test_what_cannot_be_is_refused_at_once() -> None:
    for arguments, said in (
        (("g", 0), "world_size: 0"),
        (("g", 2, 2), "there is no rank 2 among 2"),
        (("g", True), "world_size: True"),
    ):
        with pytest.raises(Refused, match=said):
            group(*arguments)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="there is no 'mpi'"):
        group("g", 2, backend="mpi")
    with pytest.raises(Refused, match="the group is not open"):
        await group("g", 2)._group.barrier()
    with pytest.raises(NoBroker):
        await member("tcp://127.0.0.1:1", 2, ranks, wait=0.2)


async def test_a_broker_that_is_restarted_while_they_meet() -> None:
    async with cluster() as all_of_it:
        first = asyncio.create_task(member(all_of_it.url, 3, ranks, 0))
        await until(lambda: all_of_it.in_flight())
        second = asyncio.create_task(member(all_of_it.url, 3, ranks, 1))
        await come(all_of_it, 2)
        await all_of_it.stop()
        await all_of_it.start()
        assert await member(all_of_it.url, 3, ranks, 2) == 2
        assert await asyncio.gather(first, second) == [0, 1]


async def test_the_broker_is_not_needed_once_they_have_met() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 2) as groups:
        await all_of_it.stop()
        found = await asyncio.gather(*[own.all_reduce(np.ones(3)) for own in groups])
        assert [each.tolist() for each in found] == [[2.0] * 3] * 2
        await all_of_it.start()


async def test_members_on_several_hosts_talk_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no local socket leads from one to the other."""
    monkeypatch.setattr(lane, "here", lambda: "elsewhere")

    async def act(own: Group) -> list[Any]:
        assert not any(each.near for each in own._mesh._lanes.values())
        large = np.arange(1 << 20, dtype=np.float32) * own.rank
        return [float(each.sum()) for each in await own.all_gather(large)]

    async with cluster() as all_of_it:
        found = await world(all_of_it.url, 3, act, address="127.0.0.1")
        assert found == [found[0]] * 3 and found[0][0] == 0
        with pytest.raises(Refused, match=r"rank \d cannot be reached: the other side is on another host.*address="):
            await world(all_of_it.url, 2, act)
        with pytest.raises(Refused, match="every address of this machine"):
            await member(all_of_it.url, 1, act, address="0.0.0.0")


async def test_with_keys_members_on_several_hosts_are_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "here", lambda: "elsewhere")
    meshes = [Mesh("127.0.0.1", secure=True) for _ in range(2)]
    members: list[tuple[Direct, dict[str, Any]]] = [(mesh.direct, {}) for mesh in meshes]
    try:
        for rank, mesh in enumerate(meshes):
            assert mesh.direct.key and mesh.direct.far.startswith("tcp://127.0.0.1:")
            mesh.join(Table(rank, b"0123456789abcdef", members))
        numbers = [mesh.begin(["barrier"]) for mesh in meshes]
        meshes[0].send(numbers[0], 0, 1)
        await asyncio.wait_for(meshes[1].take(numbers[1], 0, 0), 20)
    finally:
        for mesh in meshes:
            mesh.close()


async def test_what_is_of_another_group_is_passed_over() -> None:
    meshes = [Mesh() for _ in range(3)]
    members: list[tuple[Direct, dict[str, Any]]] = [(mesh.direct, {}) for mesh in meshes[:2]]
    try:
        for rank, token in ((0, b"a" * 16), (1, b"a" * 16)):
            meshes[rank].join(Table(rank, token, members))
        meshes[2].join(Table(1, b"b" * 16, [members[0], (meshes[2].direct, {})]))
        stranger = meshes[2].begin(["barrier"])
        meshes[2].send(stranger, 0, 0)
        await until(lambda: meshes[0].refused == 1)
        for mesh in meshes[:2]:
            mesh.begin(["barrier"])
        meshes[1].send(0, 0, 0)
        await asyncio.wait_for(meshes[0].take(0, 0, 1), 20)
        meshes[1]._tell(0, {"nothing": 1})
        meshes[1]._tell(0, {"call": "x", "step": [], "what": 1})
        await until(lambda: meshes[0].refused == 3)
        assert meshes[0].fault is None
    finally:
        for mesh in meshes:
            mesh.close()


async def test_a_member_that_comes_and_is_cut_off_at_once_is_lost_to_the_others() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 3) as groups:
        groups[1]._mesh.close()
        for rank in (0, 2):
            with pytest.raises(RankLost, match="rank 1 of 3 died") as told:
                await groups[rank].barrier()
            assert told.value.ranks == (1,)


async def test_where_the_broker_has_keys_a_member_needs_one_that_may_offer(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made = await asyncio.to_thread(lambda: ralmq("keys", "init", str(folder), home=tmp_path))
    assert not made.returncode, made.stderr
    async with Server("tcp://127.0.0.1:*", limits=PACE, keys=folder) as server:
        assert await world(server.endpoint, 2, ranks, keys=folder) == [0, 1]
        with pytest.raises(Refused, match="may not offer group:g"):
            await member(server.endpoint, 2, ranks, keys=folder / "client.key")
        asker = asyncio.create_task(member(server.endpoint, 2, ranks, keys=folder))
        await until(lambda: server.core.requests.services.get("group:g") is not None)
        with pytest.raises(Refused, match="may not offer group:other"):
            async with group("other", 2, broker=server.endpoint, keys=folder / "client.key"):
                pass
        assert await member(server.endpoint, 2, ranks, keys=folder / "client.key") == 1  # it may ask who is there
        assert await asker == 0
        with pytest.raises(Refused, match="without a key"):
            await member(server.endpoint, 2, ranks, keys="")
