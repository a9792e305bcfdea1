"""Pipelines whose stages send straight to each other: the same tokens, and the same recovery."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ralmq.errors import Refused, WorkerLost
from ralmq.schema.codec import encode
from ralmq.schema.errors import Malformed
from ralmq.schema.message import Beat, Step
from ralmq.workers.direct import memory
from ralmq.workers.host import Host
from ralmq.workers.stage import ring as ring_module
from ralmq.workers.stage.narrow import BLOCK, narrowed, widened
from ralmq.workers.stage.ring import AHEAD
from ralmq.workers.stage.worker import Stage
from relay import Relay
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
            around, straight = steps(ring)
            assert [bool(number) for number in (*steps(hub), straight)] == [count > 1, False, count > 1]
            assert around <= len(PROMPTS) and (count == 1) == (around == 0), "ends of sequences alone"

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


def elsewhere(stage: Stage, far: str) -> None:
    """Says that it is on another host, where nobody listens at that address."""
    start = stage.start

    async def started() -> None:
        await start()
        assert stage._ring is not None
        door = stage._ring._door
        door.direct = door.direct._replace(host="another", far=far)

    stage.start = started  # type: ignore[method-assign]


@pytest.mark.parametrize("answers", [False, True], ids=["nobody there", "a handshake that fails"])
def test_a_neighbour_that_cannot_be_reached_gets_its_steps_through_the_broker(
    answers: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were sent before this was known, too, each once and in order."""
    monkeypatch.setattr(ring_module, "MEET", 60.0 if answers else 0.5)

    async def main() -> None:
        path = checkpoint(FAMILY)
        members = stages(path, 3, **RING)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            if answers:
                taken.listen()
                taken.setblocking(False)

                async def hang_up() -> None:
                    while True:
                        (await asyncio.get_running_loop().sock_accept(taken))[0].close()

                closing = asyncio.create_task(hang_up())
            elsewhere(members[1], f"tcp://127.0.0.1:{taken.getsockname()[1]}")
            async with cluster(*stages(path, 3)) as hub, cluster(*members) as running:
                assert await texts(running) == await texts(hub)
                await until(lambda: members[0]._ring._lane is None)  # type: ignore[union-attr]
                assert members[1]._ring._lane is not None, "where it can be reached, it is"  # type: ignore[union-attr]
                await running.settled()
            if answers:
                closing.cancel()

    asyncio.run(main())


def test_the_end_of_a_text_may_take_long_to_the_broker(checkpoint: Callable[[str], Path]) -> None:
    """The leader has the rows sooner, since they come straight; the text is not taken for lost."""

    async def main() -> None:
        members = stages(checkpoint(FAMILY), 2, **RING)
        async with cluster(members[0]) as running, Relay(running.url) as relay:
            last = Host(members[1], relay.url)
            await last.open()
            running.hosts.append(last)
            assert len((await generated(running.client, PROMPTS[0], max_tokens=4)).tokens) == 4
            done = members[1]._runner.steps + 40
            asked = asyncio.ensure_future(generated(running.client, PROMPTS[0], max_tokens=40))
            await until(lambda: members[1]._runner.steps >= done - 30)
            relay.stop()
            await until(lambda: members[1]._runner.steps >= done)
            await asyncio.sleep(1)
            relay.go_on()
            assert len((await asked).tokens) == 40
            await running.settled()

    asyncio.run(main())


def test_memory_that_cannot_be_read_is_not_used_again(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt that was lost with it is not waited for, and the next one goes another way."""

    def refused(process: int, descriptor: int) -> None:
        raise Malformed("shared memory cannot be opened: permission denied")

    monkeypatch.setattr(memory, "_mapped", refused)
    monkeypatch.setattr(memory, "LEAST", 1024)

    async def main() -> None:
        async with cluster(*stages(checkpoint(FAMILY), 2, **RING)) as running:
            prompt = [1] * 40
            with pytest.raises(WorkerLost):
                await generated(running.client, prompt, deadline=10, max_tokens=4)
            assert len((await generated(running.client, prompt, deadline=10, max_tokens=4)).tokens) == 4

    asyncio.run(main())


def test_a_step_that_cannot_be_read_ends_the_pipeline(checkpoint: Callable[[str], Path]) -> None:
    """As it does where it comes through the broker; what belongs to no pipeline is passed over."""

    async def main() -> None:
        members = stages(checkpoint(FAMILY), 2, **RING)
        async with cluster(*members) as running:
            wanted = await texts(running)
            ring, before = members[1]._ring, members[1]._pipeline
            assert ring is not None
            ring._arrived([memoryview(b"noise")])
            for id in (bytes(16), before):
                head = bytearray(encode(Step(batch=1), id=id)[0])
                head[-1] ^= 0xFF
                assert members[1]._pipeline == before
                ring._arrived([memoryview(bytes(head))])
            await until(lambda: members[1]._pipeline not in (before, bytes(16)))
            assert await texts(running) == wanted

    asyncio.run(main())


def test_late_and_early_steps_do_not_pile_up(checkpoint: Callable[[str], Path]) -> None:
    async def main() -> None:
        members = stages(checkpoint(FAMILY), 2, **RING)
        async with cluster(*members) as running:
            await texts(running)
            ring, past = members[1]._ring, members[1]._pipeline
            assert ring is not None
            members[0].host.link.renew("a test")
            await until(lambda: members[1]._pipeline not in (past, bytes(16)))
            late = [bytes(frame) for frame in encode(Step(batch=1), id=past)]
            unknown = [bytes(frame) for frame in encode(Step(batch=1), id=b"u" * 16)]
            for _ in range(2 * AHEAD):
                ring._arrived([memoryview(frame) for frame in late])
                ring._arrived([memoryview(frame) for frame in unknown])
            assert {key: len(kept) for key, kept in ring._early.items()} == {b"u" * 16: AHEAD}
            assert not ring._door._views._mapped

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
    for wire in ("fp16", "int8"):
        for broken in (float("inf"), -float("inf"), float("nan")):
            found = widened(narrowed(torch.full((1, width), broken), wire), width)
            assert not found.isfinite().any(), "or a damaged row would go on as if it were none"
    with pytest.raises(ValueError, match="int8"):
        widened(whole[:, 1:], width)


def test_what_is_no_data_plane_or_wire() -> None:
    for option in ({"data_plane": "star"}, {"wire": "fp8"}, {"address": "0.0.0.0", **RING}):
        with pytest.raises(Refused, match="give"):
            Stage(model="demo", stage="0/1", name=MODEL, **option)
