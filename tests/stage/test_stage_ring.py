"""Pipelines whose stages send straight to each other: the same tokens, and the same recovery."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ralmq.errors import Refused, WorkerLost
from ralmq.schema.message import Beat
from ralmq.workers.stage.narrow import BLOCK, narrowed, widened
from ralmq.workers.stage.worker import Stage
from serving import until
from stage.pipelines import MODEL, Cluster, cluster, generated, prompts, stages

FAMILY = "llama"
PROMPTS = prompts(6, seed=5)
RING = {"data_plane": "ring"}


async def texts(running: Cluster, **task: object) -> list[list[int]]:
    found = await asyncio.gather(*[generated(running.client, prompt, max_tokens=24, **task) for prompt in PROMPTS])
    return [one.tokens for one in found]


def steps(running: Cluster) -> tuple[int, int]:
    """STEPs that went through the broker, and straight."""
    gauges = [host.worker.beat(Beat()).gauges for host in running.hosts]
    return sum(gauge["hub_steps"] for gauge in gauges), sum(gauge.get("ring_steps", 0) for gauge in gauges)


def mixed(path: Path) -> list[Stage]:
    members = stages(path, 4, **RING)
    members[1] = stages(path, 4)[1]  # takes from the broker, and sends to it
    return members


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_tokens_are_those_of_the_hub(count: int, checkpoint: Callable[[str], Path]) -> None:
    async def main() -> None:
        path = checkpoint(FAMILY)
        async with cluster(*stages(path, count)) as hub, cluster(*stages(path, count, **RING)) as ring:
            wanted = await texts(hub)
            assert await texts(ring) == wanted
            await ring.settled()
            assert [bool(number) for number in (*steps(hub), *steps(ring))] == [count > 1, False, False, count > 1]

    asyncio.run(main())


def test_stages_with_and_without_it_make_one_pipeline(checkpoint: Callable[[str], Path]) -> None:
    async def main() -> None:
        path = checkpoint(FAMILY)
        async with cluster(*stages(path, 4)) as hub, cluster(*mixed(path)) as running:
            assert await texts(running) == await texts(hub)
            assert min(steps(running)) > 0
            await running.settled()

    asyncio.run(main())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_lost_stage(place: int, checkpoint: Callable[[str], Path]) -> None:
    """Whoever asked hears of it, a spare takes its place, and the next texts are right."""

    async def main() -> None:
        path = checkpoint(FAMILY)
        members = stages(path, 3, **RING)
        async with cluster(*members, *stages(path, 3, **RING)) as running:
            wanted = await texts(running)
            asked = [asyncio.ensure_future(generated(running.client, prompt, max_tokens=80)) for prompt in PROMPTS]
            await asyncio.sleep(0.05)
            await running.kill(members[place])
            for end in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(end, WorkerLost) or len(end.tokens) > 0  # type: ignore[union-attr]
            assert await texts(running) == wanted
            await running.settled()

    asyncio.run(main())


def test_a_cut_between_two_stages_ends_their_pipeline(checkpoint: Callable[[str], Path]) -> None:
    """Both still have the broker; what was on its way is lost, and no asker waits for it."""

    async def main() -> None:
        path = checkpoint(FAMILY)
        members = stages(path, 3, **RING)
        async with cluster(*members) as running:
            wanted = await texts(running)
            before = members[1]._pipeline
            asked = [asyncio.ensure_future(generated(running.client, prompt, max_tokens=80)) for prompt in PROMPTS]
            await asyncio.sleep(0.05)
            ring = members[1]._ring
            assert ring is not None and ring._lane is not None
            ring._lane._ended()
            for end in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(end, WorkerLost) or len(end.tokens) == 80  # type: ignore[union-attr]
            await until(lambda: members[1]._pipeline not in (before, bytes(16)))
            assert await texts(running) == wanted
            await running.settled()

    asyncio.run(main())


def test_a_step_that_comes_before_its_form_is_kept(checkpoint: Callable[[str], Path]) -> None:
    async def main() -> None:
        members = stages(checkpoint(FAMILY), 2, **RING)
        async with cluster(members[1]) as running:
            ring, late = members[1]._ring, []
            assert ring is not None
            forms = ring.form
            ring.form = lambda pipeline, onward: late.append((pipeline, onward))  # type: ignore[method-assign]
            await running.add(members[0])
            asked = asyncio.ensure_future(generated(running.client, PROMPTS[0], max_tokens=4))
            await until(lambda: bool(ring._early))
            forms(*late[-1])
            assert len((await asked).tokens) == 4
            assert not ring._early

    asyncio.run(main())


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_fewer_bytes_between_stages(wire: str, checkpoint: Callable[[str], Path]) -> None:
    async def main() -> None:
        path = checkpoint(FAMILY)
        plain, narrow = stages(path, 3), stages(path, 3, wire=wire)
        task = {"max_tokens": 1, "logprobs": 1}
        async with cluster(*plain) as one, cluster(*narrow) as other:
            for prompt in PROMPTS:
                wanted = (await generated(one.client, prompt, **task)).logprobs[0]
                found = (await generated(other.client, prompt, **task)).logprobs[0]
                assert wanted is not None and found is not None
                assert abs(found - wanted) < (1e-3 if wire == "fp16" else 0.1)

    asyncio.run(main())


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_what_is_narrowed_is_near_what_it_was(width: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, width) * torch.logspace(-6, 6, 5)[:, None]
    hidden[2] = 0
    assert narrowed(hidden, "raw") is hidden
    whole = narrowed(hidden, "int8")
    assert whole.shape == (5, -(-width // BLOCK) * (BLOCK + 4))
    back = widened(whole, width)
    largest = hidden.abs().amax(dim=1, keepdim=True)
    assert (back - hidden).abs().le(largest / 127 / 2 * 1.01 + 1e-30).all() and back.shape == hidden.shape
    half = narrowed(hidden[:3], "fp16")
    assert torch.equal(widened(half, width), hidden[:3].half())
    assert narrowed(torch.full((1, 1), 1e9), "fp16").isfinite().all()
    with pytest.raises(ValueError, match="int8"):
        widened(whole[:, 1:], width)


def test_what_is_no_data_plane_or_wire() -> None:
    for option in ({"data_plane": "star"}, {"wire": "fp8"}):
        with pytest.raises(Refused, match="give"):
            Stage(model="demo", stage="0/1", name=MODEL, **option)
