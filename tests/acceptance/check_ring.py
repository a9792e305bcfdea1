"""Neighbours that send straight to each other: hops counted and timed, and stages killed amid it."""

import asyncio
import random
import shutil
import statistics
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ralmq
from check_faults import kill, modes, read, rest, running
from checks import Line, check, counted, size
from jobs import answer
from ralmq.client.client import Client
from serving import broker, free_url, worker

HERE = Path(__file__).parent
STAGES = 4
WAYS: dict[str, dict[str, str]] = {"hub": {}, "ring": {"ring": "true"}, "port": {"ring": "true", "port": "true"}}
SIZES = {4 << 10: 400, 1 << 20: 60, 16 << 20: 12}  # bytes of a hop, and how often
ROUNDS = 9


@check
async def hops(folder: Path) -> AsyncIterator[Line]:
    """A tensor there and back between two stages that compute nothing, in turn on each way; a hop is half of that."""
    ways: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        url = free_url()
        shutil.copy(HERE / "ping_stage.py", folder)
        stack.enter_context(broker(folder, url))
        for name, options in WAYS.items():
            for place in range(2):
                stack.enter_context(worker(folder, url, "ping_stage:Ping", name=name, place=place, **options))
        async with ralmq.connect(url, wait=30) as client:
            for _ in range(ROUNDS):
                for count, times in SIZES.items():
                    for name in WAYS:
                        body = {"bytes": count, "times": times}
                        reply = await client.request(f"lm:{name}", body, wait_service=30, deadline=120)
                        assert bool(reply.body["straight"]) is (name != "hub")
                        ways.setdefault((name, count), []).append(reply.body["seconds"] / 2)

    def ratio(one: str, other: str, count: int) -> float:
        return statistics.median(a / b for a, b in zip(ways[one, count], ways[other, count], strict=True))

    def micro(name: str, count: int) -> str:
        return f"{statistics.median(ways[name, count]) * 1e6:.0f} us"

    for count, most, said in ((4 << 10, 0.5, "4 KiB"), (1 << 20, 0.6, "1 MiB")):
        found = ratio("ring", "hub", count)
        times = f"{micro('ring', count)} of {micro('hub', count)}"
        yield Line(
            f"a hop of {said}, straight, of one through the broker",
            f"<= {most}",
            f"{found:.2f} ({times})",
            found <= most,
        )
        tcp = ratio("port", "hub", count)
        yield Line(
            f"a hop of {said}, straight over TCP, of one through the broker", "", f"{tcp:.2f}", True, required=False
        )
    gain = ratio("port", "ring", 16 << 20)
    times = f"{micro('port', 16 << 20)}, {micro('ring', 16 << 20)}"
    yield Line(
        "16 MiB through shared memory, times as fast as straight TCP", ">= 2.5", f"{gain:.2f} ({times})", gain >= 2.5
    )


async def steps(client: Client) -> dict[str, int]:
    """STEPs sent so far, through the broker and straight."""
    workers = (await client.status())["workers"]
    gauges: list[dict[str, Any]] = [entry.get("gauges", {}) for entry in workers]
    return {way: sum(gauge.get(way, 0) for gauge in gauges) for way in ("hub_steps", "ring_steps")}


@counted
async def ring_texts(folder: Path) -> AsyncIterator[Line]:
    """Four stages: the same texts as through the broker, messages counted, and each stage killed amid texts."""
    texts = modes()[0]
    ends: dict[str, list[list[int]]] = {}
    messages: dict[str, float] = {}
    for plane in ("hub", "ring"):
        async with running(folder / plane, STAGES, data_plane=plane) as (cluster, client):
            ends[plane] = [await answer(client, job) for job in texts]
            await rest(cluster, client)
            before = await steps(client)
            alone = await answer(client, texts[0])
            await rest(cluster, client)
            after = await steps(client)
            sent = {way: after[way] - before[way] for way in after}
            # each STEP through the broker is two messages; a token's PARTIAL to the broker is one more
            messages[plane] = (2 * sent["hub_steps"] + sent["ring_steps"]) / len(alone) + 1
            if plane == "ring":
                equal = kills = 0
                dice = random.Random(1)
                for place in [place for place in range(STAGES) for _ in range(size(5, 1))]:
                    strike = partial(kill, cluster, f"stage-{place}")
                    at = dice.randrange(2, 40)
                    tasks = [read(client, job, at if job is texts[0] else 0, strike) for job in texts]
                    found = await asyncio.gather(*tasks)
                    equal += sum(tokens == wanted for (tokens, _), wanted in zip(found, ends["hub"], strict=True))
                    kills += len(texts)
                    await rest(cluster, client)
    same = sum(a == b for a, b in zip(ends["hub"], ends["ring"], strict=True))
    yield Line(
        "texts of a ring of 4 stages that are those of the hub", "all", f"{same} of {len(texts)}", same == len(texts)
    )
    yield Line(
        "messages a token between 4 stages and the broker, its PARTIAL included",
        "hub 2N + 1 = 9, ring N + 1 = 5",
        f"{messages['hub']:.2f}, {messages['ring']:.2f}",
        abs(messages["hub"] - 9) < 0.5 and abs(messages["ring"] - 5) < 0.5,
    )
    yield Line(
        "texts during which a stage of the ring was killed, equal to the unbroken ones",
        "all",
        f"{equal} of {kills}",
        equal == kills,
    )
