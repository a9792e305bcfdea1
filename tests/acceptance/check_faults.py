"""Killed amid generations, with real processes: each stage, the index and the broker. Texts end as without it."""

import asyncio
import contextlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ralmq
from chaos.run import World, build, leaks
from checkpoints import tiny
from checks import Line, counted, size
from jobs import MODEL, Job, Load, answer, jobs
from ralmq.broker.limits import Limits
from ralmq.client.client import Client
from ralmq.cluster.cluster import Cluster
from ralmq.cluster.supervise import supervise
from serving import until

STAGES, TOKENS, TEXTS = 2, 64, 4  # so many prompts, each in every mode
KILLS = 20  # of each process, in each mode
BEAT = Limits().beat


@asynccontextmanager
async def running(folder: Path, stages: int = STAGES, **extra: Any) -> AsyncIterator[tuple[Cluster, Client]]:
    """Stages (with options of theirs), two generators, an index, each started again at once when it ends; a client."""
    path = tiny("llama", folder / "model")
    flags = ("-o", f"model={path}", "-o", f"name={MODEL}")
    async with Cluster(folder / "logs") as cluster:
        for place in range(stages):
            options = {"stage": f"{place}/{stages}", "deterministic": 8, **extra}
            given = [flag for name, value in options.items() for flag in ("-o", f"{name}={value}")]
            await cluster.spawn("stage", *flags, *given, name=f"stage-{place}")
        for copy in range(2):
            await cluster.spawn("generator", *flags, name=f"generator-{copy}")
        await cluster.ready()
        async with ralmq.connect(cluster.url, wait=30) as client:
            await build(client, folder / "docs")
            await cluster.spawn("index", "-o", f"index={folder / 'docs'}", name="index")
            await cluster.ready()
            supervisor = asyncio.create_task(supervise(cluster, first=0.0))
            try:
                yield cluster, client
            finally:
                supervisor.cancel()


def kill(cluster: Cluster, name: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(cluster.children[name].pid, signal.SIGKILL)


def longer(job: Job, tokens: int) -> Job:
    return replace(job, options={**job.options, "max_tokens": tokens})


def modes() -> list[list[Job]]:
    """Of each prompt four texts: greedy and sampled, without retrieval and with."""
    greedy, sampled = {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.95}
    index = {"retrieve": "docs", "k": 4, "interval": 2, "knn_temperature": 100.0}
    made = []
    for number, job in enumerate(jobs()[:TEXTS]):
        plain = {"max_tokens": TOKENS, "ignore_eos": True, "seed": number}
        ways = (plain | greedy, plain | sampled, plain | greedy | index, plain | sampled | index)
        made.append([Job(job.prompt, options) for options in ways])
    return made


@dataclass
class Kills:
    """What became of the texts during which one process was killed.

    Attributes:
        kinds: kills by process; `texts` were under way, of which so many are `equal` to the unbroken ones.
        waits: of each kill of a stage, the longest time without a token of the text at whose token it came.
        again: tokens computed a second time.
    """

    kinds: Counter[str]
    waits: list[float]
    texts: int = 0
    equal: int = 0
    again: int = 0


async def read(client: Client, job: Job, at: int, strike: Any) -> tuple[list[int], float]:
    """Its tokens, and the longest time without one behind the `at`-th, at which `strike` is called."""
    tokens: list[int] = []
    struck = longest = 0.0
    async for token in client.generate(job.prompt, model=MODEL, deadline=120.0, **job.options):
        now = time.monotonic()
        longest = max(longest, now - struck) if struck else 0.0
        struck = now if struck else 0.0
        tokens.append(token.id if token.position == len(job.prompt) + len(tokens) else -1)
        if len(tokens) == at:
            strike()
            struck = now
    return tokens, longest


async def broken_pipelines(client: Client) -> int:
    """Requests whose worker was lost with them, as the broker counts."""
    return int((await client.status())["broker"]["counts"].get("worker_lost", 0))


async def rest(cluster: Cluster, client: Client) -> dict[str, Any]:
    """The status once all is at rest, as of beats that left after that."""
    status: dict[str, Any] = {}
    await asyncio.sleep(1.1 * BEAT)

    async def calm() -> bool:
        nonlocal status
        status = await client.status()
        return not leaks(World(cluster), status)

    await until(calm, "rest", 60.0)
    return status


async def killed(cluster: Cluster, client: Client, victim: str, focus: int, texts: Any, at: int, found: Kills) -> None:
    """Four texts at a time, one in each mode; at a token of one of them a process is killed."""
    tasks = [
        read(client, job, at if place == focus else 0, lambda: kill(cluster, victim))
        for place, (job, _) in enumerate(texts)
    ]
    ends = await asyncio.gather(*tasks)
    found.kinds[victim.split("-")[0]] += 1
    found.texts += len(texts)
    found.equal += sum(tokens == wanted for (tokens, _), (_, wanted) in zip(ends, texts, strict=True))
    status = await rest(cluster, client)
    if victim != "index":  # else its pipeline went on
        found.waits.append(ends[focus][1])
        (leader,) = [worker for worker in status["workers"] if "prefilled_tokens" in worker.get("gauges", {})]
        found.again += leader["gauges"]["prefilled_tokens"]


def high(values: list[float], share: float = 0.99) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@counted
async def killed_amid_texts(folder: Path) -> AsyncIterator[Line]:
    chance = random.Random(4)
    async with running(folder) as (cluster, client):
        known = [[(job, await answer(client, job)) for job in texts] for texts in modes()]
        await rest(cluster, client)
        plan = [(f"stage-{place}", focus) for place in range(STAGES) for focus in range(4)] * KILLS
        plan += [("index", focus) for focus in (2, 3)] * KILLS
        chance.shuffle(plan)
        plan = plan[: size(len(plan), 3)]
        found = Kills(Counter(), [])
        before = await broken_pipelines(client)
        for victim, focus in plan:
            at = chance.randint(1, TOKENS // 2)
            await killed(cluster, client, victim, focus, chance.choice(known), at, found)
        broken = await broken_pipelines(client) - before
    stages, shown = found.kinds["stage"], ", ".join(f"{n} of the {kind}" for kind, n in sorted(found.kinds.items()))
    yield Line(
        "kill -9 of each stage and of the index, amid greedy and sampled texts, with kNN and without: equal texts",
        f"{found.texts} of {found.texts}; kills that ended a pipeline: all of the stages",
        f"{found.equal}; {shown}; requests that lost their stages {broken}",
        found.equal == found.texts == 4 * len(plan) and broken >= stages,
    )
    yield Line(
        "the same: wait for a token where a stage was killed, its restart included, p50 and p99; tokens computed again",
        "printed",
        f"{statistics.median(found.waits):.2f} s, {high(found.waits):.2f} s; {found.again / stages:.0f} a kill",
        True,
    )


async def listens(url: str) -> None:
    """Returns once the broker takes connections."""
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            return
        await asyncio.sleep(0.005)


async def roster(cluster: Cluster) -> float:
    """Seconds from the broker's first connection to the time when it knows every worker as ready."""
    await listens(cluster.url)
    begun = time.monotonic()
    async with ralmq.connect(cluster.url, wait=30) as fresh:

        async def everyone() -> bool:
            status = await fresh.status()
            ready = {worker["pid"] for worker in status["workers"] if worker["state"] == "ready"}
            formed = status["pipelines"] and all(line["formed"] for line in status["pipelines"])
            return bool(formed) and {c.pid for name, c in cluster.children.items() if name != "broker"} == ready

        await until(everyone, "the full roster")
        return time.monotonic() - begun


@counted
async def broker_killed_under_load(folder: Path) -> AsyncIterator[Line]:
    chance = random.Random(5)
    turns, backs, under_way = size(50, 2), [], []
    async with running(folder) as (cluster, client):
        longer_ones = [longer(job, 160) for job in jobs()]  # more than a reader has under way
        wanted = [(job, await answer(client, job)) for job in longer_ones[: size(len(longer_ones), 6)]]
        load = Load([client], wanted, seed=5)
        tasks = [asyncio.create_task(load.run(place)) for place in range(8)]
        for _ in range(turns):
            await asyncio.sleep(chance.uniform(0.5, 2.5))
            old = cluster.children["broker"]
            kill(cluster, "broker")
            under_way.append(len(load.tally.came))
            load.fault("kill")
            await until(lambda old=old: cluster.children["broker"] is not old, "the broker's restart")
            backs.append(await roster(cluster))
        load.over = True
        await asyncio.gather(*tasks)
        await rest(cluster, client)
    tally = load.tally
    yield Line(
        f"broker killed {turns} times under 8 generations: lost, doubled, wrong",
        "0, 0, 0; 8 under way at each kill",
        f"{len(tally.lost)}, {tally.doubled}, {tally.wrong}; {tally.finished} finished, {tally.given_up} given up on "
        f"purpose, {tally.tokens} tokens; at least {min(under_way)} under way {'; '.join(tally.lost[:2])}",
        not (tally.lost or tally.doubled or tally.wrong) and tally.finished > 0 and min(under_way) >= 7,
    )
    yield Line(
        "the same: every worker ready after the broker is up again",
        f"<= {3 * BEAT:g} s, 3 beats",
        f"p50 {statistics.median(backs):.2f} s, at most {max(backs):.2f} s, of {turns}",
        max(backs) <= 3 * BEAT,
    )
