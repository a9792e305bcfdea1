"""Tokens a second of a model over stages and over ranks: pipeline and tensor parallel beside each other, as measured.

Knows the client's API. The clusters run at once and are measured in turn, as in pipeline.py. Nothing is claimed of a
CPU: ranks share its cores and its memory, and each layer waits twice for the slowest of them.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..client.client import Client, connect
from ..cluster.local import flags, local_cluster
from ..workers.engine.config import read_config
from ..workers.engine.shard import fits
from ..workers.models import resolve
from .command import run
from .pipeline import generated, ratio

LAYOUTS = ((1, 1), (2, 1), (3, 1), (1, 2), (1, 4), (2, 2))  # stages, ranks of each
SEQUENCES = (1, 8)


@dataclass
class Row:
    """Medians of one layout and number of sequences at a time; `ratio` is to one stage of one rank."""

    stages: int
    ranks: int
    sequences: int
    tokens_per_s: float
    ratio: float


async def bench(model: str = "demo", *, quick: bool = False) -> list[Row]:
    """Measures; about a minute, or half of it where `quick`.

    Args:
        model: a model directory with a tokenizer, or "demo" for the embedded one. Layouts that it does not allow are
            left out.

    Raises:
        RalmqError: a cluster did not come up, or a generation failed.
    """
    rounds, tokens = (3, 24) if quick else (7, 48)
    name, path = resolve(model)
    config = read_config(path)
    layouts = [(stages, ranks) for stages, ranks in LAYOUTS if stages <= config.layers and fits(config, ranks)]
    rates: dict[tuple[int, int, int], list[float]] = {(*layout, n): [] for layout in layouts for n in SEQUENCES}
    async with AsyncExitStack() as stack:
        clients: dict[tuple[int, int], Client] = {}
        for stages, ranks in layouts:
            given = [f"model={model}", f"tp={ranks}"]
            extra = [["stage", *flags(f"stage={place}/{stages}", *given)] for place in range(stages)]
            cluster = await stack.enter_async_context(local_cluster(model=model, stages=0, extra=extra))
            clients[stages, ranks] = await stack.enter_async_context(connect(cluster.url))
            await generated(clients[stages, ranks], name, 2, 8)  # the first steps allocate
        for _ in range(rounds):
            for (stages, ranks, n), taken in rates.items():
                taken.append(await generated(clients[stages, ranks], name, n, tokens))
    return [
        Row(stages, ranks, n, statistics.median(taken), ratio(taken, rates[1, 1, n]))
        for (stages, ranks, n), taken in rates.items()
    ]


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table."""
    table = Table(title="stages and ranks, one thread each, greedy", title_justify="left")
    for heading in ("stages", "ranks of each", "sequences", "tokens/s", "of one process'"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = str(row.stages), str(row.ranks), str(row.sequences), f"{row.tokens_per_s:,.0f}", f"{row.ratio:.2f}"
        table.add_row(*figures)
    console.print(table)
    console.print(f"On {os.cpu_count()} cores, which all processes share.")


def main(arguments: Sequence[str] | None = None) -> int:
    """See command.run."""
    return run("parallel", bench, show, arguments, model=True)


if __name__ == "__main__":
    sys.exit(main())
