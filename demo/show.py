"""What the demo looks like: tables, panels and bars, at most 100 columns wide. Asks nobody, decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .measure import Row, Used

WIDTH = 100
LINE = 43  # characters of a passage


def screen() -> Console:
    """stdout; a pipe gets the full width, no control character and no progress but the last."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    return console


def heading(console: Console, text: str) -> None:
    console.print()
    console.rule(Text(text, "bold"), align="left", style="dim")


def processes(children: Iterable[tuple[str, int]], url: str, status: Mapping[str, Any]) -> Table:
    """A row for each process of the cluster: what it is, what it serves, which layers it holds."""
    workers = {worker["pid"]: worker for worker in status.get("workers", ())}
    table = _table("process", "pid", "serves", "layers", "state")
    table.columns[1].justify = "right"
    for name, pid in children:
        worker = workers.get(pid)
        state = worker["state"] if worker else "ready" if name == "broker" else "starting"
        services = ", ".join(worker.get("services", ())) if worker else url if name == "broker" else ""
        table.add_row(name, str(pid), services, _layers(worker or {}), Text(state, "green" if state == "ready" else ""))
    return table


def _layers(worker: Mapping[str, Any]) -> str:
    if "layers" not in worker:
        return ""
    first, last, layers = worker["layers"]
    return f"{first} to {last - 1} of {layers}"


class Bars:
    """A bar for each part of the work, made when it is first heard of. May be told of it by several threads."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def part(self, **labels: str) -> Callable[[str, int, int], None]:
        """Hears of the stages named in `labels`, and shows each by its label."""
        tasks: dict[str, TaskID] = {}

        def told(stage: str, done: int, total: int) -> None:
            if stage in labels:
                if stage not in tasks:
                    tasks[stage] = self._progress.add_task(labels[stage])
                self._progress.update(tasks[stage], completed=done, total=total)

        return told


def generation(title: str, prompt: str, text: str) -> Panel:
    """The prompt, and the text that goes on from it."""
    body = Text(_printable(prompt), "dim")
    body.append(_printable(text), "bold")
    return Panel(body, title=Text(title), title_align="left", box=box.ROUNDED)


def passages(documents: Sequence[Used]) -> Table:
    """Two lines for each document that was drawn on: what stands before the nearest passage, and how it goes on."""
    table = _table("document", "tokens", "distance", "context -> continuation")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.columns[0].max_width = 28
    for one in documents:
        text = Text(f"   {_flat(one.context)[-LINE:]}\n", "dim", overflow="ellipsis", no_wrap=True)
        text.append(f"-> {_flat(one.continuation)[:LINE]}", "not dim")
        table.add_row(Text(one.document), str(one.tokens), f"{one.distance:.2f}", text)
    return table


def numbers(rows: Sequence[Row]) -> Table:
    """Bits per byte of each way to predict the held-out text."""
    table = _table("held-out text predicted by", "bits/byte", "change", "store", "lambda", "temp.", "n-grams")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        change = f"{row.bits / rows[0].bits - 1:+.1%}" if row is not rows[0] else ""
        store = f"{row.tokens:,}" if row.tokens else ""
        lam = f"{row.lam:.2f}" if row.lam is not None else ""
        temperature = f"{row.temperature:g}" if row.temperature is not None else ""
        ngram = f"{row.ngram:.2f}" if row.ngram is not None else ""
        table.add_row(row.name, f"{row.bits:.3f} ±{row.spread / 2:.3f}", change, store, lam, temperature, ngram)
    return table


def stopped() -> None:
    """The one line after Ctrl-C."""
    print("ralmq: stopped; every process of the demo has ended and its files are gone", file=sys.stderr, flush=True)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _flat(text: str) -> str:
    return _printable(" ".join(text.split()))


def _printable(text: str) -> str:
    """A user's file may hold escape sequences; they are not for the terminal."""
    return "".join(one if one.isprintable() or one == "\n" else " " for one in text)
