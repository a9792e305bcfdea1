"""One span on one CPU thread against transformers and CTranslate2, against the memory's bandwidth, and its loading.

Knows what is measured and which bounds hold; the engines are in engines.py. All are measured in turn, many short
rounds over; a ratio is the median over the rounds of the ratio within a round.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .command import run
from .engines import (
    LONG,
    LONG_MOST,
    MOST,
    VOCAB,
    Generate,
    Next,
    ctranslate2,
    load_ours,
    ours,
    ours_next,
    room,
    transformers,
    write_model,
)
from .report import Check, checks_table

BATCHES = (1, 4, 8, 16)
PROMPT = 16  # tokens
MIDDLE = (4, 8)  # layers that are loaded to measure loading
READ = 400 << 20  # bytes, far more than a cache holds
FP32, PLAIN, INT8, HF, CT2, CT2_INT8 = "fp32", "fp32, packed=false", "int8", "transformers", "CTranslate2", "CT2 int8"
# (what, engine, against, batch, at least, required); a target that is not required is printed beside what is measured.
BOUNDS = (
    ("transformers.generate, batch 1", FP32, HF, 1, 1.08, True),
    ("transformers.generate, batch 8", FP32, HF, 8, 1.4, True),
    ("int8 / fp32 with packed=false, batch 1", INT8, PLAIN, 1, 2.2, True),
    ("int8 / fp32 with packed=false, batch 16", INT8, PLAIN, 16, 2.7, True),
    ("int8 / fp32, batch 1", INT8, FP32, 1, 2.2, False),
    ("int8 / fp32, batch 16", INT8, FP32, 16, 2.7, False),
    ("CTranslate2 fp32, batch 1", FP32, CT2, 1, 0.95, False),
    ("CTranslate2 fp32, batch 4", FP32, CT2, 4, 0.95, False),
    ("CTranslate2 fp32, batch 8", FP32, CT2, 8, 0.95, False),
    ("CTranslate2 int8, batch 1", INT8, CT2_INT8, 1, 0.95, False),
    ("CTranslate2 int8, batch 4", INT8, CT2_INT8, 4, 0.95, False),
    ("CTranslate2 int8, batch 8", INT8, CT2_INT8, 8, 0.95, False),
)
LONG_BOUND, FLOOR, LOADING = 1.4, 0.85, 4.0
STEPS = 4  # of long sequences, a round
MEASURED = """
torch.set_num_threads(1)
begun = time.process_time()
{}
print(time.process_time() - begun)
"""
SLICED = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
layers = model.transformer.h[{MIDDLE[0]}:{MIDDLE[1]}]
sum(parameter.sum() for parameter in layers.parameters())
"""
DIRECT = f"""
from ralmq.workers.engine.span import Span
Span.load(sys.argv[1], {MIDDLE[0]}, {MIDDLE[1]}, blocks=1)
"""


@dataclass
class Rate:
    """Medians of one engine with one number of sequences at a time; `of_fp32` is the share of ours in fp32, `context`
    how many tokens a sequence has at first."""

    engine: str
    batch: int
    tokens_per_s: float
    of_fp32: float
    context: int = PROMPT


@dataclass
class Note:
    """What the reader of the figures should know."""

    text: str


@dataclass
class Engines:
    """All that generate, some of them from long sequences, and what our fp32 span reads of its weights for each token,
    in bytes."""

    generate: dict[str, Generate]
    following: dict[str, Next]
    weights: int
    notes: list[Note]


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    begun = clock()
    call()
    return clock() - begun


def load(path: Path, work: Path) -> Engines:
    """Every engine that is installed."""
    span, int8 = load_ours(path, packed=True), load_ours(path, dtype="int8", packed=True)
    generate = {FP32: ours(span), PLAIN: ours(load_ours(path)), INT8: ours(int8)}
    following = {FP32: ours_next(span), INT8: ours_next(int8)}
    notes = []
    reference = transformers(path)
    if reference is None:
        notes.append(Note("transformers is not installed: nothing to compare with (pip install 'ralmq[hf]')"))
    else:
        generate[HF], following[HF] = reference
    for name, quantization in ((CT2, None), (CT2_INT8, "int8")):
        made = ctranslate2(path, work, quantization)
        if isinstance(made, str):
            notes.append(Note(f"{made}: no row of {name}"))
        else:
            generate[name] = made
    positions = 0 if span.positions is None else span.positions.nbytes
    return Engines(generate, following, span.bytes - positions, notes)


async def bench(*, quick: bool = False) -> list[Any]:
    """Measures: about 4 minutes, or one where `quick`. Rates, checks and notes, in this order."""
    torch.set_num_threads(1)
    rounds, tokens, batches = (3, 8, (1, 8, 16)) if quick else (5, 16, BATCHES)
    assert tokens + PROMPT <= room() and max(batches) <= MOST
    with tempfile.TemporaryDirectory() as folder:
        path, work = Path(folder) / "model", Path(folder) / "converted"
        write_model(path)
        engines = load(path, work)
        loading = loading_ratios(path, 3) if HF in engines.generate else []
        taken, floors = measure(engines, rounds, tokens, batches)
        steps = measure_long(engines, rounds)
    rates = [
        Rate(name, batch, batch * tokens / statistics.median(times), ratio(taken[FP32, batch], times))
        for (name, batch), times in taken.items()
    ]
    rates += [
        Rate(name, batch, batch / statistics.median(times), ratio(steps[FP32, batch], times), LONG)
        for (name, batch), times in steps.items()
    ]
    checks = [
        check(what, ratio(taken[against, batch], taken[engine, batch]), least, required)
        for what, engine, against, batch, least, required in BOUNDS
        if (against, batch) in taken
    ]
    if HF in engines.following:
        what = f"a step of transformers, batch {LONG_MOST} after {LONG} tokens"
        found = ratio(steps[HF, LONG_MOST], steps[FP32, LONG_MOST])
        checks.append(check(what, found, LONG_BOUND, False))
    checks.append(check("share of the bandwidth floor, fp32, batch 1", statistics.median(floors), FLOOR, True))
    if loading:
        checks.append(
            check(
                f"CPU time, from_pretrained and slicing / layers {MIDDLE[0]}:{MIDDLE[1]}",
                statistics.median(loading),
                LOADING,
                True,
            )
        )
    return [*rates, *checks, *engines.notes]


def measure(
    engines: Engines, rounds: int, tokens: int, batches: Sequence[int]
) -> tuple[dict[tuple[str, int], list[float]], list[float]]:
    """Seconds of each engine and batch, round by round; and of our fp32 at batch 1 the share of the floor.

    The floor of a token is the time in which one thread reads the weights once; prompts are not part of it.
    """
    taken: dict[tuple[str, int], list[float]] = {(name, batch): [] for batch in batches for name in engines.generate}
    memory = torch.ones(READ // 4)
    floors = []
    prompts = torch.randint(VOCAB - 1, (max(batches), PROMPT), generator=torch.Generator().manual_seed(0))
    for generate in engines.generate.values():
        generate(prompts[:2], 2)  # the first steps allocate
    for _ in range(rounds):
        for (name, batch), times in taken.items():
            times.append(seconds(partial(engines.generate[name], prompts[:batch], tokens)))
        fastest = min(seconds(memory.sum) for _ in range(3))
        long, short = (seconds(partial(engines.generate[FP32], prompts[:1], n)) for n in (2 * tokens, 1))
        floors.append(engines.weights / (READ / fastest) / ((long - short) / (2 * tokens - 1)))
    return taken, floors


def measure_long(engines: Engines, rounds: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of a step of 1 and of 8 long sequences, round by round."""
    taken: dict[tuple[str, int], list[float]] = {(name, n): [] for n in (1, LONG_MOST) for name in engines.following}
    for name, batch in taken:
        engines.following[name](batch)  # the first step allocates
    for _ in range(rounds):
        for (name, batch), times in taken.items():
            step = partial(engines.following[name], batch)
            times.append(statistics.median(seconds(step) for _ in range(STEPS)))
    return taken


def loading_ratios(path: Path, rounds: int) -> list[float]:
    """CPU seconds of loading the model with transformers and keeping some layers, by those of loading these layers.

    Each in a process of its own, what it imports besides torch included. transformers maps the file: its weights are
    touched once, as the first step would, so that both have them in memory.
    """

    def spent(code: str) -> float:
        command = [sys.executable, "-c", f"import sys, time, torch\n{MEASURED.format(code)}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return float(done.stdout)

    return [spent(SLICED) / spent(DIRECT) for _ in range(rounds)]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median([a / b for a, b in zip(slow, fast, strict=True)])


def check(what: str, measured: float, least: float, required: bool) -> Check:
    return Check(what, f">= {least:.2f}", measured, measured >= least, required)


def show(rows: Sequence[Any], console: Console) -> None:
    """Prints rates, bounds and notes."""
    table = Table(title="GPT-2 124M, random weights, one thread, greedy", title_justify="left")
    table.add_column("engine")
    for heading in ("sequences", "context", "tokens/s", "of fp32"):
        table.add_column(heading, justify="right")
    for row in rows:
        if isinstance(row, Rate):
            figures = (f"{row.context:,}", f"{row.tokens_per_s:,.1f}", f"{row.of_fp32:.2f}")
            table.add_row(row.engine, str(row.batch), *figures)
    console.print(table)
    console.print(checks_table([row for row in rows if isinstance(row, Check)]))
    for row in rows:
        if isinstance(row, Note):
            console.print(f"[yellow]{row.text}[/]")


def main(arguments: Sequence[str] | None = None) -> int:
    """See command.run."""
    return run("engine", bench, show, arguments)


if __name__ == "__main__":
    sys.exit(main())
