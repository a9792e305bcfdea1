"""Tokens a second and idle time of a model over one, two and more stages, and with more sequences at a time.

Knows the client's API. The clusters run at once and are measured in turn, many short rounds over, so that what else the
machine does hits all alike; a ratio is the median over the rounds of the ratio within a round.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ..client.client import Client, connect
from ..cluster.local import local_cluster
from ..workers.models import resolve
from .command import run

STAGES = (1, 2, 3)
SEQUENCES = (1, 4, 16)
PROMPT = "Return a new array of the given shape"
BEATS = 2.2  # seconds after which the last beats of all stages have told what they did


@dataclass
class Row:
    """Medians of one number of stages and of sequences at a time.

    Attributes:
        ratio: to one stage with as many sequences.
        batching: to as many stages with one sequence.
        bubbles: of each stage, the share of the time that it stood idle while its pipeline had work.
    """

    stages: int
    sequences: int
    tokens_per_s: float
    ratio: float
    batching: float
    bubbles: list[float]


async def generated(client: Client, model: str, sequences: int, tokens: int, **options: Any) -> float:
    """Tokens a second, all sequences together, the prompts' computation included."""

    async def one() -> int:
        stream = client.generate(PROMPT, model=model, max_tokens=tokens, ignore_eos=True, retries=8, **options)
        return sum([1 async for token in stream if token.id >= 0])

    begun = time.perf_counter()
    made = sum(await asyncio.gather(*[one() for _ in range(sequences)]))
    return made / (time.perf_counter() - begun)


async def gauges(clients: dict[int, Client]) -> dict[int, list[dict[str, float]]]:
    """What the stages of each pipeline have said of their work, in their order, once all have."""
    await asyncio.sleep(BEATS)
    found = {}
    for stages, client in clients.items():
        status = await client.status()
        of = {worker["name"]: worker.get("gauges", {}) for worker in status["workers"]}
        found[stages] = [of[name] for name in status["pipelines"][0]["stages"]]
    return found


async def idle(clients: dict[int, Client], model: str, tokens: int) -> dict[tuple[int, int], list[float]]:
    """Bubble ratios of each stage: those of `ralmq status`, but of one number of sequences each."""
    found = {}
    before = await gauges(clients)
    for sequences in SEQUENCES:
        for client in clients.values():
            await generated(client, model, sequences, tokens)
        after = await gauges(clients)
        for stages in clients:
            work = after[stages][0]["work_s"] - before[stages][0]["work_s"]
            spent = [b["compute_s"] - a["compute_s"] for a, b in zip(before[stages], after[stages], strict=True)]
            found[stages, sequences] = [round(max(0.0, 1 - seconds / work), 3) for seconds in spent]
        before = after
    return found


async def bench(model: str = "demo", *, quick: bool = False) -> list[Row]:
    """Measures; about a minute, or half of it where `quick`.

    Args:
        model: a model directory with a tokenizer, or "demo" for the embedded one.

    Raises:
        RalmqError: a cluster did not come up, or a generation failed.
    """
    rounds, tokens = (3, 32) if quick else (7, 64)
    rates: dict[tuple[int, int], list[float]] = {(stages, n): [] for stages in STAGES for n in SEQUENCES}
    name, _ = resolve(model)
    async with AsyncExitStack() as stack:
        clients: dict[int, Client] = {}
        for stages in STAGES:
            cluster = await stack.enter_async_context(local_cluster(model=model, stages=stages))
            clients[stages] = await stack.enter_async_context(connect(cluster.url))
            await generated(clients[stages], name, 2, 8)  # the first steps allocate
        for _ in range(rounds):
            for stages, sequences in rates:
                rates[stages, sequences].append(await generated(clients[stages], name, sequences, tokens))
        bubbles = await idle(clients, name, tokens)
    return [
        Row(
            stages,
            sequences,
            statistics.median(taken),
            ratio(taken, rates[STAGES[0], sequences]),
            ratio(taken, rates[stages, SEQUENCES[0]]),
            bubbles[stages, sequences],
        )
        for (stages, sequences), taken in rates.items()
    ]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median([a / b for a, b in zip(above, below, strict=True)])


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table."""
    table = Table(title="generation, one thread a stage, greedy", title_justify="left")
    for heading in ("stages", "sequences", "tokens/s", "of one stage's", "of one sequence's", "idle, each stage"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = f"{row.tokens_per_s:,.0f}", f"{row.ratio:.2f}", f"{row.batching:.2f}"
        bubbles = ", ".join(f"{bubble:.0%}" for bubble in row.bubbles)
        table.add_row(str(row.stages), str(row.sequences), *figures, bubbles)
    console.print(table)
    console.print(f"On {os.cpu_count()} cores: stages on one machine share them, and its memory bandwidth.")


def main(arguments: Sequence[str] | None = None) -> int:
    """See command.run."""
    return run("pipeline", bench, show, arguments, model=True)


if __name__ == "__main__":
    sys.exit(main())
