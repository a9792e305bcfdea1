"""What goes wrong in a call: who is late, gone, dead or in another call is named, by all the others."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.errors import Refused
from ralmq.workers.group.errors import RankLost, RankMissing
from ralmq.workers.group.group import Group
from serving import broker, free_url, until
from worlds import cluster, opened

HERE = Path(__file__).parent
ONES = {"small": np.ones(10, np.float32), "large": np.ones(1 << 20, np.float32)}


async def behind(group: Group, call: Any) -> None:
    """A call may have ended here before the other one is known."""
    await call
    await group.barrier()


async def errors_of(groups: list[Group], call: Any) -> list[Any]:
    return list(await asyncio.gather(*[call(group) for group in groups], return_exceptions=True))


CALLS: dict[str, Any] = {
    "barrier": lambda group, x: group.barrier(timeout=0.3),
    "all_reduce": lambda group, x: group.all_reduce(x, timeout=0.3),
    "reduce": lambda group, x: group.reduce(x, root=1, timeout=0.3),
    "all_gather": lambda group, x: group.all_gather(x, timeout=0.3),
    "reduce_scatter": lambda group, x: group.reduce_scatter([x] * 4, timeout=0.3),
    "gather": lambda group, x: group.gather(x, root=0, timeout=0.3),
    "broadcast from it": lambda group, x: group.broadcast(x, root=2, timeout=0.3),
    "scatter from it": lambda group, x: group.scatter(root=2, timeout=0.3),
}


@pytest.mark.parametrize("what", ["small", "large"])
@pytest.mark.parametrize("name", CALLS)
async def test_the_one_that_does_not_take_part_is_named_by_all(name: str, what: str) -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 4) as groups:
        present = [group for group in groups if group.rank != 2]
        found = await errors_of(present, lambda group: CALLS[name](group, ONES[what]))
        late = [error for error in found if error is not None]
        assert len(late) == (1 if name == "gather" or (name, what) == ("reduce", "small") else 3)  # who waits for it
        for error in late:
            assert isinstance(error, RankMissing) and error.ranks == (2,)
            assert "rank 2 of 4 did not take part in" in str(error) and "within 0.3 s" in str(error)
        await until(lambda: all(group._mesh.fault is not None for group in groups))
        with pytest.raises(RankMissing, match="rank 2"):  # also to itself
            await groups[2].barrier()
        with pytest.raises(RankMissing, match="rank 2"):  # and for ever
            await groups[0].barrier()


async def test_all_that_are_missing_are_named() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 5) as groups:
        present = [groups[0], groups[3]]
        for error in await errors_of(present, lambda group: group.barrier(timeout=0.2)):
            assert isinstance(error, RankMissing) and error.ranks == (1, 2, 4)
            assert "ranks 1, 2 and 4 of 5" in str(error)


async def test_one_that_has_left_is_named() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 3) as groups:
        await errors_of(groups, lambda group: group.barrier())
        waiting = asyncio.create_task(groups[0].all_reduce(ONES["small"]))
        await asyncio.sleep(0)
        await groups[1].close()
        with pytest.raises(RankLost, match="rank 1 has left the group") as told:
            await waiting
        assert told.value.ranks == (1,)
        with pytest.raises(RankLost, match="rank 1 has left"):
            await groups[2].barrier()


async def test_what_was_sent_before_leaving_arrives() -> None:
    """The last call of each may end at other times: nobody that has left is missed in it."""
    async with cluster() as all_of_it:
        for _ in range(5):
            async with opened(all_of_it.url, 3) as groups:

                async def act(group: Group) -> list[Any]:
                    found = await group.gather(ONES["large"] * group.rank)
                    await group.close()
                    return found or []

                found = await asyncio.gather(*[act(group) for group in groups])
                assert [float(each.sum()) for each in found[0]] == [0.0, 1.0 * (1 << 20), 2.0 * (1 << 20)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda group: group.barrier() if group.rank == 1 else group.all_gather(ONES["small"]), "calls barrier()"),
        (lambda group: group.all_reduce(ONES["small" if group.rank else "large"]), "float32, \\[10\\]\\)"),
        (lambda group: group.all_reduce(ONES["small"], "max" if group.rank else "min"), "all_reduce\\(max, float32"),
        (lambda group: group.broadcast(ONES["small"], group.rank), "broadcast\\(1\\)"),
        (lambda group: group.all_reduce(ONES["small"].astype("f4" if group.rank else "f8")), "float64, \\[10\\]"),
    ],
)
async def test_calls_that_do_not_belong_together_are_refused_at_both(call: Any, said: str) -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 2) as groups:
        for error in await errors_of(groups, lambda group: behind(group, call(group))):
            assert isinstance(error, Refused), error
            assert "all members must make the same calls in the same order" in str(error)
        with pytest.raises(Refused, match=said):
            await groups[0].barrier()


async def test_a_call_that_is_given_up_ends_it_for_all() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 2) as groups:
        calling = asyncio.create_task(groups[1].barrier())
        await asyncio.sleep(0.05)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        with pytest.raises(RankLost, match="rank 1 of 2 gave up its call of barrier"):
            for _ in range(2):  # the first one may have its answer already
                await groups[0].barrier()


async def test_what_cannot_be_given_is_refused_and_harms_nobody() -> None:
    async with cluster() as all_of_it, opened(all_of_it.url, 2) as groups:
        one, x = groups[0], ONES["small"]
        for call, said in (
            (one.all_reduce(x, "median"), "no operation: use one of sum, mean"),
            (one.all_reduce(x > 0), "sum of bool"),
            (one.all_reduce(3.0), "no tensor"),
            (one.all_gather(np.array(["text"])), "does not travel"),
            (one.broadcast(x, 2), "there is no rank 2 among 2"),
            (one.scatter([x]), "1 arrays for 2 members"),
            (one.broadcast(), "no tensor"),
            (one.reduce_scatter([x, x.astype(int)]), "several dtypes"),
        ):
            with pytest.raises(Refused, match=said):
                await call
        found = await errors_of(groups, lambda group: group.all_reduce(x))
        assert [each.tolist() for each in found] == [[2.0] * 10] * 2


# -- processes


class Members:
    """The members of a group of four as processes, and what each has said."""

    def __init__(self, url: str, *do: str, backend: str = "direct") -> None:
        self._url, self._do, self._backend = url, do, backend
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        for rank, do in enumerate(self._do):
            arguments = (self._url, str(len(self._do)), str(rank), do, self._backend)
            started = asyncio.create_subprocess_exec(
                sys.executable, str(HERE / "members.py"), *arguments, stdout=subprocess.PIPE
            )
            self.processes.append(await started)

    async def says(self, rank: int) -> dict[str, Any]:
        stream = self.processes[rank].stdout
        assert stream is not None
        line = await asyncio.wait_for(stream.readline(), 60)
        assert line, f"rank {rank} has ended"
        told: dict[str, Any] = json.loads(line)
        return told

    def send(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    async def end(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


@asynccontextmanager
async def members(folder: Path, *do: str, backend: str = "direct") -> AsyncIterator[Members]:
    url = free_url()
    with broker(folder, url):
        found = Members(url, *do, backend=backend)
        try:
            await found.start()
            for rank in range(len(do)):
                assert await found.says(rank) == {"rank": rank}
            yield found
        finally:
            await found.end()


@pytest.mark.parametrize("backend", ["direct", "gloo"])
async def test_one_that_is_killed_in_the_middle_of_calls_is_named(tmp_path: Path, backend: str) -> None:
    async with members(tmp_path, "on", "on", "on", "on", backend=backend) as found:
        for rank in range(4):
            assert await found.says(rank) == {"turns": 3}
        found.send(2, signal.SIGKILL)
        for rank in (0, 1, 3):
            told = await found.says(rank)
            assert (told["error"], told["ranks"]) == ("RankLost", [2]), told
            assert "rank 2 of 4 died" in told["text"]
            assert await asyncio.wait_for(found.processes[rank].wait(), 30) == 0


async def test_one_that_is_killed_while_the_others_wait_is_named(tmp_path: Path) -> None:
    async with members(tmp_path, "on", "absent", "on") as found:
        found.send(1, signal.SIGKILL)
        for rank in (0, 2):
            told = await found.says(rank)
            assert (told["error"], told["ranks"]) == ("RankLost", [1])


async def test_one_that_is_stopped_is_named(tmp_path: Path) -> None:
    async with members(tmp_path, "on", "on", "on") as found:
        for rank in range(3):
            assert await found.says(rank) == {"turns": 3}
        found.send(0, signal.SIGSTOP)
        for rank in (1, 2):
            told = await found.says(rank)
            assert told["ranks"] == [0]


async def test_those_that_leave_in_order_leave_nobody_in_doubt(tmp_path: Path) -> None:
    async with members(tmp_path, "once", "once", "once") as found:
        for rank in range(3):
            assert await found.says(rank) == {"turns": 3}
        for process in found.processes:
            assert await asyncio.wait_for(process.wait(), 30) == 0
            assert process.stdout is not None and await process.stdout.read() == b""
