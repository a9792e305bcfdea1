"""Stages of several ranks in a cluster: the same tokens, and what happens when a rank or its stage dies."""

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny
from commands import runs
from ralmq.client.client import connect
from ralmq.schema.errors import Refused, WorkerLost
from ralmq.workers.stage.ranks import Ranks, device_of
from ralmq.workers.stage.weights import load, place_of
from ralmq.workers.stage.worker import Stage
from serving import broker, free_url, until, worker
from stage.pipelines import MODEL, Cluster, cluster, generated, lm, prompts, scored, stages
from transformers import T5Config, T5ForConditionalGeneration

PROMPTS = prompts(3, seed=5)
EXACT = {"deterministic": 8}  # so that what is computed again has the same bits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("stage-ranks") / "llama")


def ranks(stage: Stage) -> Ranks:
    assert stage._loaded is not None and stage._loaded.ranks is not None
    return stage._loaded.ranks


async def answers(path: Path, count: int, **options: Any) -> tuple[list[list[int]], Any]:
    """Ids of three generations at once, and the score of a text."""
    members = stages(path, count, **options)
    async with cluster(*members) as running:
        tasks = [generated(running.client, prompt, max_tokens=10) for prompt in PROMPTS]
        found = [answer.tokens for answer in await asyncio.gather(*tasks)]
        hidden, log_p = await scored(running.client, PROMPTS[0])
        await running.settled()
        left = [pid for stage in members if options.get("tp", 1) > 1 for pid in ranks(stage).pids]
        assert len(left) == count * (options.get("tp", 1) - 1) and all(map(runs, left))
    assert not any(map(runs, left))
    return found, (hidden, log_p)


@pytest.mark.parametrize(("tp", "count"), [(2, 1), (4, 1), (2, 2)])
async def test_ranks_and_stages_give_the_tokens_of_one(model: Path, tp: int, count: int) -> None:
    wanted, (hidden, log_p) = await answers(model, 1)
    found, (others, log_q) = await answers(model, count, tp=tp)
    assert found == wanted
    assert abs(others - hidden).max() < 1e-5 * abs(hidden).max() and abs(log_q - log_p).max() < 1e-4


async def test_a_killed_rank_is_a_lost_stage(model: Path) -> None:
    """Amid generations, of either stage. A replay on spares gives the same tokens; no process stays."""
    async with cluster(*stages(model, 2, tp=2, **EXACT)) as running:
        wanted = await generated(running.client, PROMPTS[0], max_tokens=60)
    for place in range(2):
        members = stages(model, 2, tp=2, **EXACT)
        spares = stages(model, 2, tp=2, **EXACT)
        async with cluster(*members, *spares) as running:
            await replayed(running, members[place], wanted.tokens)
            left = [pid for stage in (*members, *spares) for pid in ranks(stage).pids]
        assert not any(map(runs, left))


async def replayed(running: Cluster, stage: Stage, wanted: list[int]) -> None:
    """Kills a rank of `stage` once some tokens are there, asks for the rest as a generator does, and compares."""
    made: list[int] = []
    prompt = PROMPTS[0]
    while len(made) < len(wanted):
        left = len(wanted) - len(made)
        try:
            async for part in lm(running.client, prompt + made, window=8, max_tokens=left, ignore_eos=True):
                made.append(part.body["token"])
                if len(made) == 7:
                    os.kill(ranks(stage).pids[0], signal.SIGKILL)
        except WorkerLost:
            assert len(made) >= 7
    assert made == wanted

    async def gone() -> bool:
        names = [gauges["name"] for gauges in await running.gauges()]
        return len(names) == 3 and stage.host._closed

    await until(gone, "the end of the stage")
    assert "killed by signal 9" in ranks(stage).lost


async def test_a_rank_that_dies_while_nothing_runs(model: Path) -> None:
    members = stages(model, 1, tp=2)
    async with cluster(*members) as running:
        os.kill(ranks(members[0]).pids[0], signal.SIGKILL)

        async def gone() -> bool:
            return not await running.gauges()

        await until(gone, "the end of the stage")
        await running.add(*stages(model, 1, tp=2))
        assert len((await generated(running.client, PROMPTS[0], max_tokens=3)).tokens) == 3


async def test_a_rank_that_stands_still_is_a_stage_that_hangs(model: Path) -> None:
    """It neither computes nor ends: the stage is given up as one whose own computation hangs."""
    members = stages(model, 1, tp=2)
    members[0].stall_limit = 1.0
    async with cluster(*members) as running:
        (pid,) = ranks(members[0]).pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost):
            await generated(running.client, PROMPTS[0], max_tokens=3)
        await until(lambda: members[0].host._closed, "the end of the stage")
        await until(lambda: not runs(pid), "the end of the rank")


def children(pid: int) -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def listening(pid: int) -> set[str]:
    """Addresses, as the kernel writes them, on which a process waits for connections."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:"):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", ["stage", "rank", "nobody"])
async def test_processes_end_together(model: Path, tmp_path: Path, victim: str) -> None:
    """A stage killed takes its ranks along; a rank killed ends its stage, which says why; nothing else is left."""
    url = free_url()
    folders = set(Path(tempfile.gettempdir()).glob("ralmq-ranks-*"))
    options = {"model": str(model), "stage": "0/1", "name": MODEL, "tp": 2}
    with broker(tmp_path, url), worker(tmp_path, url, "stage", **options) as stage:
        async with connect(url, wait=30) as client:
            await until(lambda: "serves a span" in stage.log, "a stage that serves")
            ids = children(stage.pid)
            assert len(ids) == 1
            assert all(listening(pid) <= {"0100007F"} for pid in (stage.pid, *ids)), "on the loopback interface alone"
            running = Cluster(url, client)
            generation = asyncio.create_task(generated(client, PROMPTS[0], max_tokens=200))
            await until(lambda: steps(running), "a step")
            if victim == "nobody":
                await generation
                stage.send(signal.SIGTERM)
                assert await stage.ended() == 0
            else:
                os.kill(stage.pid if victim == "stage" else ids[0], signal.SIGKILL)
                with pytest.raises(WorkerLost):
                    await generation
                assert await stage.ended() == (-9 if victim == "stage" else 1)
                if victim == "rank":
                    assert "rank 1 of this stage was killed by signal 9" in stage.log
            await until(lambda: not any(map(runs, ids)), "the end of the ranks")
    assert set(Path(tempfile.gettempdir()).glob("ralmq-ranks-*")) <= folders


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_nothing_is_left_of_a_stage_that_is_killed_while_it_loads(model: Path, tmp_path: Path) -> None:
    folders = set(Path(tempfile.gettempdir()).glob("ralmq-ranks-*"))
    options = {"model": str(model), "stage": "0/1", "name": MODEL, "tp": 2}
    with worker(tmp_path, free_url(), "stage", **options) as stage:
        await until(lambda: children(stage.pid), "a rank")
        ids = children(stage.pid)
        stage.send(signal.SIGKILL)
        await until(lambda: not any(map(runs, ids)), "the end of the rank")
    assert set(Path(tempfile.gettempdir()).glob("ralmq-ranks-*")) <= folders


async def steps(running: Cluster) -> bool:
    return any(gauges.get("steps", 0) > 2 for gauges in await running.gauges())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tp": 3}, "tp=3 does not split 4 heads and 2 kv heads; give one of 1, 2, 4"),
        ({"tp": 2, "dtype": "fp8"}, "dtype fp8 is unknown"),
        ({"tp": 2, "device": "cuda:7"}, "device=cuda:7 cannot be used"),
    ],
)
async def test_what_is_refused(model: Path, options: dict[str, Any], said: str) -> None:
    """In one line, and no rank is left."""
    before = children(os.getpid())
    place = place_of(str(model), "0/1", "", MODEL)
    with pytest.raises(Refused, match=said) as caught:
        given = {"device": "cpu", "dtype": "fp32", "kv_mib": 4, "max_rows": 4, **options}
        await asyncio.to_thread(load, place, **given)
    assert "\n" not in str(caught.value)
    assert [pid for pid in children(os.getpid()) if runs(pid)] == before


async def test_encoder_decoders_and_foreign_layers_are_refused(tmp_path: Path) -> None:
    """Each in a line of its own, before a process is started."""
    t5 = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tiny("gpt_neox", tmp_path / "foreign", 2)
    for name, said in (("t5", "this is an encoder-decoder"), ("foreign", "runs on transformers'")):
        place = place_of(str(tmp_path / name), "0/1", "", MODEL)
        with pytest.raises(Refused, match=f"tp is of .*{said}.*; leave it out"):
            load(place, "cpu", "fp32", 4, 4, tp=2)


NOISE = """
import os, threading, time
def talk():
    while not any(thread.name == "parent" for thread in threading.enumerate()):
        time.sleep(0.001)
    while True:
        os.write(1, b"a library that prints\\n" * 4000)
threading.Thread(target=talk, daemon=True).start()
"""


async def test_what_a_library_prints_comes_between_no_ranks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NCCL does with NCCL_DEBUG: a stage reads its ranks' words, and after that nothing of them."""
    (tmp_path / "sitecustomize.py").write_text(NOISE.replace("while True", "for _ in range(4)"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    place = place_of(str(model), "0/1", "", MODEL)
    loaded = await asyncio.to_thread(load, place, "cpu", "fp32", 1, 4, tp=2)
    await asyncio.to_thread(loaded.close)


async def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    """Before the others have met it."""
    made = Ranks(2, tmp_path / "nowhere", 0, 2, "cpu", 1, {"blocks": 4})
    try:
        with pytest.raises(Refused, match=r"rank 1: .*nowhere.config.json: no such file"):
            await asyncio.to_thread(made.join, "cpu")
    finally:
        await asyncio.to_thread(made.close)


def test_devices_of_ranks() -> None:
    assert [device_of("cpu", rank) for rank in range(2)] == ["cpu", "cpu"]
    assert [device_of("cuda", rank) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert [device_of("cuda:2", rank) for rank in range(2)] == ["cuda:2", "cuda:3"]


async def test_more_memory_for_keys_and_values(model: Path) -> None:
    """kv_mib is of each rank, and each has a part of the heads."""
    place = place_of(str(model), "0/1", "", MODEL)
    found: dict[int, int] = {}
    for tp in (1, 2):
        loaded = await asyncio.to_thread(load, place, "cpu", "fp32", 1, 1024, tp=tp)
        found[tp] = loaded.offer.kv_blocks
        await asyncio.to_thread(loaded.close)
    assert found[2] == 2 * found[1]


async def test_stages_that_sum_otherwise_form_no_pipeline(model: Path) -> None:
    """Where the same bits are asked for, and there alone."""
    place = place_of(str(model), "0/1", "", MODEL)
    for deterministic, differ in ((0, False), (8, True)):
        alone = load(place, "cpu", "fp32", 1, 4, deterministic=deterministic)
        loaded = await asyncio.to_thread(load, place, "cpu", "fp32", 1, 4, deterministic=deterministic, tp=2)
        await asyncio.to_thread(loaded.close)
        assert (loaded.offer.fingerprint != alone.offer.fingerprint) is differ
