"""A pipeline whose askers give up, read slowly, or lose a stage: everything comes back, and the others go on."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ralmq.client.stream import Stream
from ralmq.errors import DeadlineExceeded, RalmqError, WorkerFailed, WorkerLost
from ralmq.workers.stage.batch import Phase
from ralmq.workers.stage.worker import Stage
from serving import until
from stage.pipelines import MODEL, Brake, Cluster, cluster, generated, lm, prompts, stages

FAMILY = "llama"
PROMPT = prompts(1, seed=3)[0]
TWO_LONG = {"max_rows": 2}  # KV blocks for two sequences of the whole context


def served(path: Path, count: int, body: Callable[[Cluster, list[Stage]], Any], spare: int = 0, **options: Any) -> None:
    async def main() -> None:
        members = stages(path, count, **options)
        async with cluster(*members, *stages(path, count, **options)[:spare]) as running:
            await body(running, members)
            await running.settled()

    asyncio.run(main())


def phases(leader: Stage) -> list[Phase]:
    return [sequence.phase for sequence in leader._leader._sequences.values()] if leader._leader is not None else []


async def given_up(stream: Stream) -> None:
    """Leaves a stream that somebody may be reading."""
    await stream.aclose()
    with suppress(RalmqError):
        await anext(stream)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_cancel_while_a_row_is_on_its_way(place: int, checkpoint: Callable[[str], Path]) -> None:
    """The credit comes back only when no stage writes to the sequence's blocks any more."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        brake = Brake(members[place])
        streams = [lm(running.client, PROMPT, max_tokens=100, ignore_eos=True) for _ in range(3)]
        await until(lambda: phases(members[0]) == [Phase.AWAITED] * 3)
        for stream in streams:
            await given_up(stream)
        await asyncio.sleep(0.2)
        gauges = (await running.gauges())[0]
        assert gauges["in_flight"] == 3 and gauges["sequences"] == 3, "blocks are in use"
        assert members[0]._leader.memory.available < members[0]._leader.memory.blocks  # type: ignore[union-attr]
        brake.release()
        await running.settled()
        assert len((await generated(running.client, PROMPT, max_tokens=5)).tokens) == 5

    served(checkpoint(FAMILY), 3, body)


def test_cancel_while_it_waits_for_blocks(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster, members: list[Stage]) -> None:
        brake = Brake(members[1])
        long = [np.random.default_rng(seed).integers(3, 100, 240).tolist() for seed in range(4)]
        first = [lm(running.client, prompt, max_tokens=3) for prompt in long[:2]]
        waiting = [lm(running.client, prompt, max_tokens=3) for prompt in long[2:]]
        await until(lambda: phases(members[0]).count(Phase.WAITING) == 2)
        await given_up(waiting[0])
        await until(lambda: len(phases(members[0])) == 3)
        await given_up(first[0])
        brake.release()
        for stream in (first[1], waiting[1]):  # the blocks that came free serve the one that waited
            assert len([part async for part in stream]) == 3

    served(checkpoint(FAMILY), 2, body, **TWO_LONG)


def test_slow_readers_give_way(checkpoint: Callable[[str], Path]) -> None:
    """Their blocks serve others meanwhile; they go on with the tokens that they would have had."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        long = {"max_tokens": 60, "ignore_eos": True}
        starts = [np.random.default_rng(seed).integers(3, 100, 190).tolist() for seed in range(4)]
        slow = [lm(running.client, prompt, window=2, **long) for prompt in starts[:2]]
        await until(lambda: phases(members[0]) == [Phase.PAUSED] * 2)
        others = await asyncio.gather(*[generated(running.client, prompt, max_tokens=60) for prompt in starts[2:]])
        assert [len(other.tokens) for other in others] == [60] * 2
        assert members[0]._leader is not None and members[0]._leader.preempted >= 1
        read = [[part.body["token"] async for part in stream] for stream in slow]
        assert read == [(await generated(running.client, prompt, max_tokens=60)).tokens for prompt in starts[:2]]

    served(checkpoint(FAMILY), 2, body, **TWO_LONG)


def test_a_slow_reader_pauses_its_own_sequence(checkpoint: Callable[[str], Path]) -> None:
    """It gets exactly its window, whatever the others do; and all the rest once it reads on."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        slow = lm(running.client, PROMPT, max_tokens=50, ignore_eos=True, window=4)
        others = await asyncio.gather(*[generated(running.client, p, max_tokens=40) for p in prompts(4)])
        assert [len(other.tokens) for other in others] == [40] * 4
        await until(lambda: phases(members[0]) == [Phase.PAUSED])
        (paused,) = members[0]._leader._sequences.values()  # type: ignore[union-attr]
        assert len(paused.tokens) - len(PROMPT) == 4
        tokens = [part.body["token"] async for part in slow]
        assert tokens == (await generated(running.client, PROMPT, max_tokens=50)).tokens
        left = lm(running.client, PROMPT, max_tokens=50, ignore_eos=True, window=4)
        await until(lambda: phases(members[0]) == [Phase.PAUSED])
        await given_up(left)

    served(checkpoint(FAMILY), 2, body)


def test_many_give_up_at_any_time(checkpoint: Callable[[str], Path]) -> None:
    """60 requests, two thirds of them left after a random part or at their deadline; the others are whole."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        chance = np.random.default_rng(4)

        async def one(number: int, prompt: list[int]) -> int:
            if number % 3 == 0:
                return len((await generated(running.client, prompt, max_tokens=30)).tokens)
            if number % 3 == 1:
                with suppress(DeadlineExceeded):
                    deadline = chance.uniform(0.005, 0.3)
                    return len((await generated(running.client, prompt, max_tokens=200, deadline=deadline)).tokens)
                return -1
            stream = lm(running.client, prompt, max_tokens=200, ignore_eos=True, window=int(chance.integers(1, 20)))
            for _ in range(chance.integers(0, 15)):
                await anext(stream)
            await given_up(stream)
            return -2

        counts = await asyncio.gather(*[one(n, prompt) for n, prompt in enumerate(prompts(60, seed=1))])
        assert counts[0::3] == [30] * 20 and counts[1::3].count(-1) > 0 and counts[2::3] == [-2] * 20

    served(checkpoint(FAMILY), 3, body, max_rows=8)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_computation_that_raises_ends_its_rows_alone(place: int, checkpoint: Callable[[str], Path]) -> None:
    """One row a micro-batch: the stage fails with one of them, the others never hear of it."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        span = members[place]._runner._span
        forward = span.forward

        def failing(rows: Any, *given: Any, **options: Any) -> Any:
            if rows[0].position in (70, 75):
                raise RuntimeError("out of memory")
            return forward(rows, *given, **options)

        span.forward = failing  # type: ignore[method-assign]
        random = np.random.default_rng(0)
        lengths = (10, 65, 20, 72, 5)
        asked = [random.integers(3, 128, length).tolist() for length in lengths]
        ends = await asyncio.gather(
            *[generated(running.client, prompt, max_tokens=40) for prompt in asked], return_exceptions=True
        )
        for length, end in zip(lengths, ends, strict=True):
            if length in (65, 72):
                assert isinstance(end, WorkerFailed) and "m failed: RuntimeError: out of memory" in end.message
            else:
                assert len(end.tokens) == 40  # type: ignore[union-attr]
        await running.settled()
        span.forward = forward  # type: ignore[method-assign]
        assert len((await generated(running.client, asked[1], max_tokens=40)).tokens) == 40

    served(checkpoint(FAMILY), 3, body, max_rows=1)


def test_a_message_that_cannot_travel_ends_its_sequence(checkpoint: Callable[[str], Path]) -> None:
    """A part too large for the wire at the last stage, a STEP too large at the first."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        await generated(running.client, PROMPT, max_tokens=1)
        last = members[1]._runner.last
        assert last is not None
        took = last._took

        def too_large(sequence: Any, body: dict[str, Any], outcome: Any) -> None:
            took(sequence, body, outcome)
            if body["position"] == 70:
                outcome.sent[-1][0].body["passages"] = bytes(2 << 20)

        last._took = too_large  # type: ignore[method-assign]
        asked = [PROMPT, [7] * 65, [9] * 3]
        ends = await asyncio.gather(
            *[generated(running.client, prompt, max_tokens=20) for prompt in asked], return_exceptions=True
        )
        assert isinstance(ends[1], WorkerFailed) and "cannot travel" in ends[1].message
        assert all(len(ends[n].tokens) == 20 for n in (0, 2))  # type: ignore[union-attr]
        await running.settled()

        forward = members[0]._runner._span.forward
        members[0]._runner._span.forward = lambda rows, ids: (  # type: ignore[method-assign]
            torch.zeros(1, 300 << 20, dtype=torch.uint8) if rows[0].count == 65 else forward(rows, ids)
        )
        with pytest.raises(WorkerFailed, match="Malformed: a tensor"):
            await generated(running.client, [8] * 65, max_tokens=20)
        assert len((await generated(running.client, PROMPT, max_tokens=20)).tokens) == 20

    served(checkpoint(FAMILY), 2, body)


async def lost_once(running: Cluster, victim: Stage) -> None:
    """Kills a stage in the middle of 6 generations: each asker hears of it, once."""
    streams = [lm(running.client, prompt, max_tokens=200, ignore_eos=True) for prompt in prompts(6)]
    for stream in streams:
        await anext(stream)
    await running.kill(victim)
    for stream in streams:
        with pytest.raises(WorkerLost, match=f"lm:{MODEL} lost stage-"):
            async for _ in stream:
                pass
        with pytest.raises(RalmqError, match="its end was read before"):
            await anext(stream)
    status = await running.client.status()
    assert status["broker"]["open_requests"] == 0 and status["broker"]["counts"]["worker_lost"] % 6 == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_spare_takes_the_place_of_a_lost_stage(place: int, checkpoint: Callable[[str], Path]) -> None:
    """All stages have a spare: the pipeline forms anew at once, with empty caches, and gives the same tokens."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        before = await generated(running.client, PROMPT, max_tokens=30)
        await lost_once(running, members[place])
        after = await generated(running.client, PROMPT, max_tokens=30)
        assert after.tokens == before.tokens
        await running.settled()
        formed = (await running.client.status())["pipelines"]
        assert [len(pipeline["stages"]) for pipeline in formed] == [3]

    async def main() -> None:
        path = checkpoint(FAMILY)
        spare = Stage(model=str(path), stage=f"{place}/3", name=MODEL)
        members = stages(path, 3)
        async with cluster(*members, spare) as running:
            await body(running, members)

    asyncio.run(main())


@pytest.mark.parametrize("place", [0, 1])
def test_what_was_computed_for_a_pipeline_that_is_over_is_dropped(
    place: int, checkpoint: Callable[[str], Path]
) -> None:
    """A stage is busy while the pipeline is formed anew around it: its late results belong to nobody."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        before = await generated(running.client, PROMPT, max_tokens=30)
        brake = Brake(members[place])
        streams = [lm(running.client, prompt, max_tokens=30, ignore_eos=True) for prompt in prompts(3)]
        await until(lambda: phases(members[0]) == [Phase.AWAITED] * 3 and (place == 0 or members[1]._waiting >= 2))
        leader = members[0]._leader
        await running.kill(members[2])
        for stream in streams:
            with pytest.raises(WorkerLost):
                await anext(stream)
        await running.add(Stage(model=str(checkpoint(FAMILY)), stage="2/3", name=MODEL))
        await until(lambda: members[0]._leader not in (None, leader))
        asked = asyncio.create_task(generated(running.client, PROMPT, max_tokens=30))
        await until(lambda: phases(members[0]) == [Phase.AWAITED])
        brake.release()
        assert (await asked).tokens == before.tokens

    served(checkpoint(FAMILY), 3, body)


@pytest.mark.parametrize("place", [0, 1])
def test_a_stage_that_returns_completes_the_pipeline_again(place: int, checkpoint: Callable[[str], Path]) -> None:
    """Twice; in between requests wait, or fail at their deadline, and the status names the layers that are missing."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        path, victim = checkpoint(FAMILY), members[place]
        before = await generated(running.client, PROMPT, max_tokens=30)
        for _ in range(2):
            await lost_once(running, victim)
            (pipeline,) = (await running.client.status())["pipelines"]
            assert not pipeline["formed"] and pipeline["missing"] == ("0-1 of 4", "2-3 of 4")[place]
            with pytest.raises(DeadlineExceeded):
                await generated(running.client, PROMPT, max_tokens=30, deadline=0.2)
            waiting = asyncio.create_task(generated(running.client, PROMPT, max_tokens=30))
            victim = Stage(model=str(path), stage=f"{place}/2", name=MODEL)
            await running.add(victim)
            assert (await waiting).tokens == before.tokens

    served(checkpoint(FAMILY), 2, body)


def test_a_request_of_a_pipeline_that_is_over_does_not_enter_the_next(checkpoint: Callable[[str], Path]) -> None:
    """It waits to hear of its index while the pipeline is formed anew around the same leader."""

    async def body(running: Cluster, members: list[Stage]) -> None:
        entered, go = asyncio.Event(), asyncio.Event()

        async def slow(*_: Any) -> str:
            entered.set()
            with suppress(asyncio.CancelledError):
                await go.wait()
            await go.wait()
            return "l2"

        members[0]._indexes.check = slow  # type: ignore[method-assign]
        asked = asyncio.create_task(generated(running.client, PROMPT, retrieve={"index": "i"}))
        await entered.wait()
        leader = members[0]._leader
        await running.kill(members[1])
        with pytest.raises(WorkerLost):
            await asked
        await running.add(Stage(model=str(checkpoint(FAMILY)), stage="1/2", name=MODEL))
        await until(lambda: members[0]._leader not in (None, leader))
        go.set()
        await running.settled()
        assert [host.worker._runner.steps for host in running.hosts] == [0, 0]  # type: ignore[attr-defined]

    served(checkpoint(FAMILY), 2, body)
