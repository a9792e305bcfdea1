"""Tokens a second of a model over one, two and more stages, and with more sequences at a time. Knows the client's API.

The clusters run at once and are measured in turn, many short rounds over, so that what else the machine does hits all
alike; a ratio is the median over the rounds of the ratio within a round.
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
from .command import run

STAGES = (1, 2, 3)
SEQUENCES = (1, 4, 16)
PROMPT = "Return a new array of the given shape"


@dataclass
class Row:
    """Medians of one number of stages and of sequences at a time; `ratio` is to one stage with as many sequences."""

    stages: int
    sequences: int
    tokens_per_s: float
    ratio: float


async def generated(client: Client, model: str, sequences: int, tokens: int, **options: Any) -> float:
    """Tokens a second, all sequences together, the prompts' computation included."""

    async def one() -> int:
        stream = client.generate(PROMPT, model=model, max_tokens=tokens, ignore_eos=True, retries=8, **options)
        return sum([1 async for token in stream if token.id >= 0])

    begun = time.perf_counter()
    made = sum(await asyncio.gather(*[one() for _ in range(sequences)]))
    return made / (time.perf_counter() - begun)


async def bench(model: str = "demo", *, quick: bool = False) -> list[Row]:
    """Measures; about a minute, or 20 s where `quick`.

    Raises:
        RalmqError: a cluster did not come up, or a generation failed.
    """
    rounds, tokens = (3, 32) if quick else (7, 64)
    rates: dict[tuple[int, int], list[float]] = {(stages, n): [] for stages in STAGES for n in SEQUENCES}
    async with AsyncExitStack() as stack:
        clients: dict[int, Client] = {}
        for stages in STAGES:
            cluster = await stack.enter_async_context(local_cluster(model=model, stages=stages))
            clients[stages] = await stack.enter_async_context(connect(cluster.url))
            await generated(clients[stages], model, 2, 8)  # the first steps allocate
        for _ in range(rounds):
            for stages, sequences in rates:
                rates[stages, sequences].append(await generated(clients[stages], model, sequences, tokens))
    return [
        Row(
            stages,
            sequences,
            statistics.median(taken),
            statistics.median([a / b for a, b in zip(taken, rates[STAGES[0], sequences], strict=True)]),
        )
        for (stages, sequences), taken in rates.items()
    ]


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table."""
    table = Table(title="generation, one thread a stage, greedy", title_justify="left")
    for heading in ("stages", "sequences", "tokens/s", "of one stage's"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(str(row.stages), str(row.sequences), f"{row.tokens_per_s:,.0f}", f"{row.ratio:.2f}")
    console.print(table)
    console.print(f"On {os.cpu_count()} cores: stages on one machine share them, and its memory bandwidth.")


def main(arguments: Sequence[str] | None = None) -> int:
    """See command.run."""
    return run("pipeline", lambda quick: bench(quick=quick), show, arguments)


if __name__ == "__main__":
    sys.exit(main())
