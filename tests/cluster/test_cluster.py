"""Real processes: a cluster comes up, changes, tells what ended, and leaves nothing behind."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ralmq
from commands import env_of, eventually, runs
from ralmq.cluster.child import Child
from ralmq.cluster.cluster import Cluster
from ralmq.cluster.local import local_cluster
from ralmq.cluster.supervise import supervise
from ralmq.errors import DeadlineExceeded, RalmqError, Refused, WorkerFailed
from serving import free_url

ECHO = ["echo"]


def pids(cluster: Cluster) -> list[int]:
    return [child.pid for child in cluster.children.values()]


def test_a_cluster_serves_grows_and_is_gone_with_its_folder() -> None:
    async def go() -> tuple[list[int], Path]:
        async with local_cluster(stages=0, generator=False, extra=[ECHO, ["echo", "-o", "name=two"]]) as cluster:
            assert list(cluster.children) == ["broker", "echo", "echo-1"]
            async with ralmq.connect(cluster.url) as client:
                assert (await client.request("two", {"n": 1})).body == {"n": 1}
                late = await cluster.spawn("echo", "-o", "name=late", name="late")
                status = await cluster.ready()
                assert late.pid in {worker["pid"] for worker in status["workers"]}
                assert (await client.request("late", {"n": 2})).body == {"n": 2}
                await cluster.stop("late")
                assert late.code == 0
                await cluster.ready()  # one that was asked to end is not missed
            assert {path.name for path in cluster.directory.iterdir()} >= {"broker.log", "echo.log", "late.log"}
            return pids(cluster), cluster.directory

    started, folder = asyncio.run(go())
    assert len(started) == 4
    assert not any(map(runs, started))
    assert not folder.exists()


def test_every_process_has_one_thread_unless_told(tmp_path: Path) -> None:
    async def go() -> list[str]:
        async with Cluster(tmp_path) as cluster:
            await cluster.spawn("echo")
            await cluster.spawn("echo", threads=3)
            await cluster.ready()
            return [Path(f"/proc/{pid}/environ").read_text() for pid in pids(cluster)]

    found = [part for text in asyncio.run(go()) for part in text.split("\0") if part.startswith("OMP_NUM_THREADS=")]
    assert [part.partition("=")[2] for part in found] == ["1", "1", "3"]


def test_bad_options_of_a_process_reach_the_user_as_they_are() -> None:
    async def go() -> None:
        async with local_cluster(stages=0, generator=False, extra=[["echo", "-o", "speed=1"]]):
            raise AssertionError("it cannot become ready")

    with pytest.raises(Refused, match=r"^Echo has no option speed"):
        asyncio.run(go())


def test_a_killed_process_is_reported_with_its_last_line(tmp_path: Path) -> None:
    async def go() -> None:
        async with Cluster(tmp_path) as cluster:
            child = await cluster.spawn("echo")
            await cluster.ready()
            os.kill(child.pid, signal.SIGKILL)
            assert await cluster.ended() is child
            assert child.code == -signal.SIGKILL
            text = str(child.failure())
            assert "echo was killed by signal 9" in text and "serves echo" in text and str(child.log) in text
            with pytest.raises(WorkerFailed, match="killed by signal 9"):
                await cluster.ready()

    asyncio.run(go())


def test_a_drained_process_is_said_to_be_so_and_started_again(tmp_path: Path) -> None:
    """What its log says last is no reason: it ended in order."""
    lines: list[str] = []

    async def go() -> None:
        async with Cluster(tmp_path) as cluster:
            supervisor = asyncio.create_task(supervise(cluster, lines.append, first=0.01))
            child = await cluster.spawn("echo")
            await cluster.ready()
            os.kill(child.pid, signal.SIGTERM)
            while "echo was started again" not in lines:
                await asyncio.sleep(0.01)
            supervisor.cancel()
            assert child.code == 0

    asyncio.run(go())
    assert lines[0].startswith("echo ended in order, asked by a signal or `ralmq drain` (log: ")
    assert "serves" not in lines[0] and len(lines) == 2


def test_every_interface_is_bound_and_one_is_connected_to(tmp_path: Path) -> None:
    async def go() -> None:
        async with Cluster(tmp_path, bind="tcp://0.0.0.0:*", insecure=True) as cluster:
            assert cluster.url.startswith("tcp://127.0.0.1:")
            assert "0.0.0.0" not in cluster.outside
            await cluster.spawn("echo")
            await cluster.ready()
            before = cluster.url
            cluster.children["broker"].kill()
            await cluster.children["broker"].wait()
            await cluster.restart("broker")
            async with ralmq.connect(before, wait=30) as client:
                assert (await client.request("echo", {"n": 1}, wait_service=30)).body == {"n": 1}

    asyncio.run(go())


def test_an_encoder_decoder_comes_with_its_encoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "t5")

    async def go() -> set[str]:
        async with local_cluster(model=str(tmp_path / "t5"), stages=2) as cluster:
            return set((await cluster.ready())["services"])

    assert asyncio.run(go()) == {"lm:t5", "generate:t5", "encode:t5"}


def test_what_is_missing_is_named_when_it_takes_too_long(tmp_path: Path) -> None:
    async def go() -> None:
        async with Cluster(tmp_path) as cluster:
            child = await cluster.spawn("echo", name="sleepy")
            os.kill(child.pid, signal.SIGSTOP)
            try:
                await cluster.ready(within=1.5)
            finally:
                os.kill(child.pid, signal.SIGCONT)

    with pytest.raises(DeadlineExceeded, match="sleepy not announced"):
        asyncio.run(go())


def test_a_name_is_taken_while_its_process_runs(tmp_path: Path) -> None:
    async def go() -> None:
        async with Cluster(tmp_path) as cluster:
            await cluster.spawn("echo", name="one")
            await cluster.spawn("echo", name="one")

    with pytest.raises(Refused, match="one runs in this cluster"):
        asyncio.run(go())


PARENT = """
import asyncio
from ralmq.cluster.local import local_cluster
from ralmq.cluster.supervise import supervise

async def main():
    async with local_cluster(stages=0, generator=False, extra=[["echo"], ["echo", "-o", "name=two"]]) as cluster:
        print(*(child.pid for child in cluster.children.values()), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env_of(tmp_path, {"TMPDIR": str(tmp_path)}),
    )
    with parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(children) == 3 and all(map(runs, children))
            parent.send_signal(number)
            parent.wait(60)
        finally:
            parent.kill()  # what started the tests may have it ignore SIGINT
    eventually(lambda: not any(map(runs, children)))
    if number == signal.SIGINT:
        assert list(tmp_path.glob("ralmq-*")) == []


def test_what_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process can be made, then the new one cannot be recorded, and nobody reads what is told."""
    lines: list[str] = []
    records: list[int] = []
    starts: list[str] = []

    def told(line: str) -> None:
        lines.append(line)
        raise OSError("No space left on device")

    def record() -> None:
        records.append(1)
        if len(records) < 3:
            raise OSError("No space left on device")

    async def go() -> None:
        async with Cluster(tmp_path) as cluster:
            restart = cluster.restart

            async def failing(name: str) -> Child:
                starts.append(name)
                if len(starts) < 3:
                    raise BlockingIOError("Resource temporarily unavailable")
                return await restart(name)

            monkeypatch.setattr(cluster, "restart", failing)
            supervisor = asyncio.create_task(supervise(cluster, told, record, first=0.01))
            await cluster.spawn("echo", "-o", "name=e")
            async with ralmq.connect(cluster.url) as client:
                assert (await client.request("e", {"n": 1}, wait_service=30)).body == {"n": 1}
                os.kill(cluster.children["echo"].pid, signal.SIGKILL)
                assert (await client.request("e", {"n": 2}, wait_service=30, deadline=60)).body == {"n": 2}
            while "echo was started again" not in lines:
                await asyncio.sleep(0.01)
            assert not supervisor.done()
            supervisor.cancel()

    asyncio.run(go())
    assert len(starts) == 3 and len(records) == 3
    assert sum("echo could not be started again" in line for line in lines) == 2
    assert sum("echo could not be recorded" in line for line in lines) == 2


def test_what_ends_is_started_again_with_growing_pauses(tmp_path: Path) -> None:
    """Each time on the same command; the log goes on; what its own input ends is left alone."""
    lines: list[str] = []

    async def go() -> None:
        async with Cluster(tmp_path) as cluster:
            changes: list[int] = []
            supervisor = asyncio.create_task(supervise(cluster, lines.append, lambda: changes.append(1), first=0.01))
            await cluster.spawn("echo", "-o", "name=e")
            await cluster.spawn("echo", "-o", "speed=1", name="wrong")
            async with ralmq.connect(cluster.url) as client:
                for count in range(3):
                    assert (await client.request("e", {"n": count}, wait_service=30)).body == {"n": count}
                    old = cluster.children["echo"]
                    os.kill(old.pid, signal.SIGKILL)
                    while cluster.children["echo"] is old:
                        await asyncio.sleep(0.01)
                assert (await client.request("e", {"n": 9}, wait_service=30)).body == {"n": 9}
            assert len(changes) == 3
            supervisor.cancel()

    asyncio.run(go())
    assert sum("echo was killed by signal 9" in line for line in lines) == 3
    assert lines.count("echo was started again") == 3
    assert sum("Echo has no option speed" in line for line in lines) == 1 and "wrong was started again" not in lines


def test_the_name_of_a_process_fits_into_a_hello(tmp_path: Path) -> None:
    """Model and machine have up to 64 characters each, a worker 128 with its suffix."""

    async def go() -> None:
        async with Cluster(tmp_path, site="k" * 64) as running:
            await running.spawn("echo", name="m" * 64 + "-generator")
            (worker,) = (await running.ready())["workers"]
            assert worker["name"].startswith("m" * 64 + "-generator@kkk")

    asyncio.run(go())


def test_what_is_waited_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ralmq.cluster.cluster.PATIENCE", 0.05)

    async def main() -> None:
        cluster, lines = Cluster(tmp_path), []
        cluster.url = free_url()
        with pytest.raises(RalmqError, match=r"has not answered|no broker answers"):
            await cluster.ready(0.5, told=lines.append)
        assert lines == [
            f"waiting: the broker at {cluster.url} has not answered: is it started, and is that its address?"
        ]

    asyncio.run(main())
