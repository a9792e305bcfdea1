"""Stages that ask the broker for their layers, in one process: what they load joins into a pipeline that answers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny
from ralmq.broker.records import Peer
from ralmq.broker.server import Server
from ralmq.client.client import connect
from ralmq.errors import Refused
from ralmq.schema.frame import Prefix
from ralmq.schema.keys import PLACE
from ralmq.workers.host import Host
from ralmq.workers.stage import placing
from ralmq.workers.stage.worker import Stage
from serving import until
from stage.pipelines import MODEL, Cluster, cluster, generated, stages


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("auto") / "llama", layers=6)


async def spans(running: Cluster) -> list[tuple[int, int]]:
    workers = (await running.client.status())["workers"]
    return sorted((worker["layers"][0], worker["layers"][1]) for worker in workers if "layers" in worker)


def auto(path: Path, **options: object) -> Stage:
    return Stage(model=str(path), name=MODEL, **{"memory": "1GiB", "kv_tokens": 64, **options})  # type: ignore[arg-type]


def test_unequal_stages_take_unequal_spans_and_answer_as_even_ones(path: Path) -> None:
    """Each layer costs the same; the third is half as fast and gets fewer."""

    async def go() -> None:
        async with cluster(*stages(path, 2)) as even:
            expected = await generated(even.client, [5, 6, 7], max_tokens=8)
        async with cluster() as running:
            joining = [auto(path, stage="auto/3", speed=speed) for speed in (0.5, 0.5, 0.25)]
            await asyncio.gather(*[running.add(stage) for stage in joining])
            found = await spans(running)
            assert [last - first for first, last in found] != [2, 2, 2]
            (pipeline,) = (await running.client.status())["pipelines"]
            assert pipeline["formed"] and len(pipeline["stages"]) == len(found)
            workers = (await running.client.status())["workers"]
            slow = next(worker for worker in workers if worker["labels"]["speed"] == 0.25)
            sizes = {worker["labels"]["speed"]: worker["layers"][1] - worker["layers"][0] for worker in workers}
            assert sizes[0.25] < sizes[0.5], slow
            answer = await generated(running.client, [5, 6, 7], max_tokens=8)
            assert answer.tokens == expected.tokens

    asyncio.run(go())


def test_a_stage_that_is_lost_leaves_its_layers_to_the_next(path: Path) -> None:
    async def go() -> None:
        async with cluster() as running:
            first, second = auto(path, stage="auto/2", speed=1.0), auto(path, stage="auto/2", speed=1.0)
            await asyncio.gather(running.add(first), running.add(second))
            before = await spans(running)
            assert len(before) == 2
            await running.kill(first)
            await running.add(auto(path, stage="auto/2", speed=1.0))
            assert await spans(running) == before

            async def formed() -> bool:
                return bool((await running.client.status())["pipelines"][0]["formed"])

            await until(formed, "a pipeline")
            assert len((await generated(running.client, [5], max_tokens=4)).tokens) == 4

    asyncio.run(go())


def test_speed_is_measured_where_none_is_given_and_the_cache_holds_what_was_asked_for(path: Path) -> None:
    async def go() -> None:
        stage = auto(path, stage="auto/1", kv_tokens=100)
        async with cluster(stage) as running:
            (worker,) = (await running.client.status())["workers"]
            assert worker["layers"] == [0, 6, 6] and worker["labels"]["speed"] > 0.1
            assert stage.span is not None and stage.span.kv_blocks >= 7

    asyncio.run(go())


def test_a_broker_that_goes_away_meanwhile_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a question has; the next broker knows nobody, and is asked."""
    monkeypatch.setattr(placing, "DEADLINE", 0.2)

    async def go() -> None:
        async with Server("tcp://127.0.0.1:*") as server:
            url = server.endpoint
            first = asyncio.create_task(Host(early := auto(path, stage="auto/2"), url).open())

            async def asks() -> bool:
                return any(peer.name.startswith("stage") for peer in server.core.roster.peers.values())

            await until(asks, "the stage's question")
        await asyncio.sleep(1.0)
        assert not first.done()
        async with Server(url), connect(url) as client:
            late = Host(auto(path, stage="auto/2"), url)
            await asyncio.gather(first, late.open())
            layers = [worker["layers"] for worker in (await client.status())["workers"] if "layers" in worker]
            assert sorted(layers)[0][1] == sorted(layers)[1][0]
            await late.close()
            await early.host.close()

    asyncio.run(go())


def test_a_stage_asks_a_last_time_before_it_is_announced_over_another_connection(path: Path) -> None:
    """However short it loaded: its lease reaches beyond the end of the connection on which it asked."""

    async def go() -> None:
        async with Server("tcp://127.0.0.1:*") as server:
            held: list[object] = []
            answer = server.core.requests.builtins[PLACE]

            def seen(now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any] | None:
                held.append(body.get("held"))
                return answer(now, asker, prefix, body)

            server.core.requests.builtins[PLACE] = seen
            host = Host(auto(path, stage="auto/1"), server.endpoint)
            await host.open()
            await host.close()
            assert held[-1] == [0, 6] and held[0] is None

    asyncio.run(go())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": "auto/0"}, "auto/3"),
        ({"stage": "auto/x"}, "auto/3"),
        ({"stage": "auto", "memory": "lots"}, "no amount of memory"),
        ({"stage": "auto", "speed": -1.0}, "numbers above 0"),
        ({"stage": "auto", "tp": 2}, "tp or deterministic"),
        ({"stage": "auto", "deterministic": 4}, "tp or deterministic"),
        ({"stage": "0/1", "memory": "1GiB"}, "memory is for stage=auto"),
        ({"layers": "0:6", "memory": "", "kv_tokens": 0, "speed": 1.0}, "speed is for stage=auto"),
    ],
)
def test_options_that_do_not_go_together_are_refused(path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        auto(path, **options)


def test_a_device_that_is_not_there_is_refused(path: Path) -> None:
    async def go() -> None:
        async with cluster(auto(path, stage="auto", device="cuda:77")):
            raise AssertionError("it cannot be measured")

    with pytest.raises(Refused, match="device=cuda:77 cannot be used"):
        asyncio.run(go())


def test_a_container_has_no_more_memory_than_it_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = placing._free("cpu")
    monkeypatch.setattr(placing, "CGROUP", tmp_path)
    assert placing._free("cpu") > 1 << 21 < free, "no group"
    (tmp_path / "memory.current").write_text("1048576\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert placing._free("cpu") > 1 << 21
    (tmp_path / "memory.max").write_text("3145728\n")
    assert placing._free("cpu") == 1 << 21
