"""The planner: against every split, three unequal machines, and its prediction against the clock."""

import asyncio
import shutil
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ralmq
from checks import Line, check
from plan.test_plan_spans import INSTANCES, every_split, instance, slowest
from ralmq.schema.plan.plan import Plan, make_plan
from ralmq.schema.plan.slots import Slot
from ralmq.schema.plan.spans import Task, best_spans
from ralmq.workers.speed import measured
from ralmq.workers.weigh import weigh
from serving import broker, free_url, worker
from stage.pipelines import MODEL
from timing import Ours, gpt2, prompts

HERE = Path(__file__).parent
TOKENS = 60
ROUNDS = 5
MEMORY = 4 << 30
SHARE = 0.20  # by which a prediction may miss


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians: tokens/s of one sequence, and of one at each stage; GB/s of this machine between those runs."""

    alone: float
    together: float
    speed: float


@check
async def planner_against_brute_force(folder: Path) -> AsyncIterator[Line]:
    worse = fitted = 0
    for seed in range(INSTANCES):
        task = instance(seed)
        best = min(slowest(task, spans) for spans in every_split(task))
        found = best_spans(task)
        fitted += found is not None
        worse += (slowest(task, found) if found is not None else float("inf")) > best
    what = f"{INSTANCES} random instances ({fitted} fit): slowest stage worse than that of the best split"
    yield Line(what, "0", f"{worse}", worse == 0)


async def run(folder: Path, path: Path, plan: Plan, factors: dict[str, float]) -> Measured:
    """The plan's stages as processes, slowed by their factors, and the machine's speed in turn with them."""
    url = free_url()
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        for share in plan.used:
            layers, factor = f"{share.first}:{share.last}", factors[share.slot.name]
            options = {"model": path, "layers": layers, "name": MODEL, "factor": factor}
            stack.enter_context(worker(folder, url, "slowed_stage:Slowed", **options))
        async with ralmq.connect(url, wait=60) as client:
            first = [np.array([5, 6], np.int32)]
            await client.request(f"lm:{MODEL}", {"max_tokens": 4}, tensors=first, wait_service=120, deadline=180)
            ours, stages = Ours(client), len(plan.used)
            alone, together, speeds = [], [], []
            for _ in range(ROUNDS):
                speeds.append(await asyncio.to_thread(measured))
                alone.append((await ours.run(prompts(1, 8), TOKENS)).rate)
                speeds.append(await asyncio.to_thread(measured))
                together.append((await ours.run(prompts(stages, 8), TOKENS)).rate)
    return Measured(statistics.median(alone), statistics.median(together), statistics.median(speeds))


def planned(path: Path, speed: float, factors: dict[str, float]) -> Plan:
    slots = [Slot(name, MEMORY, speed / factor) for name, factor in factors.items()]
    return make_plan(weigh(str(path)), slots, kv_tokens=256)


def at(speed: float, plan: Plan, factors: dict[str, float]) -> Plan:
    """The same spans as this machine's speed was while they were measured."""
    task = Task(plan.load, (), 0, plan.load.layers)
    shares = []
    for share in plan.used:
        slot = replace(share.slot, speed=speed / factors[share.slot.name])
        shares.append(replace(share, slot=slot, seconds=task.seconds(slot, share.first, share.last)))
    return replace(plan, shares=tuple(shares))


@check
async def prediction(folder: Path) -> AsyncIterator[Line]:
    """GPT-2 124M over machines of which some are 2 to 6 times as slow, all of them processes of this one."""
    path = gpt2()
    shutil.copy(HERE / "slowed_stage.py", folder)
    for factors in ({"a": 1.0}, {"a": 2.0, "b": 4.0}, {"a": 3.0, "b": 3.0, "c": 6.0}):
        plan = planned(path, measured(), factors)
        counts = spans_of(plan)
        if len(factors) == 3:
            yield Line("layers of 3 machines slowed 3, 3 and 6 times", "unequal", f"{counts}", len(set(counts)) > 1)
        found = await run(folder, path, plan, factors)
        predicted = at(found.speed, plan, factors)
        slow = ", ".join(f"{factor:g}" for factor in factors.values())
        for what, told, got in (
            ("one sequence", predicted.alone, found.alone),
            (f"{len(plan.used)} sequences", predicted.together, found.together),
        ):
            off = got / told - 1
            line = f"slowed {slow}, spans {counts}, {what}: tokens/s measured, of what was predicted"
            yield Line(line, f"within {SHARE:.0%}", f"{got:.1f} of {told:.1f} ({off:+.0%})", abs(off) <= SHARE)


def spans_of(plan: Plan) -> Sequence[int]:
    return [share.last - share.first for share in plan.used]
