"""Simulates many seeds on all cores, or one with a trace of every message.

    python tests/simulation/run.py --seeds 10000           seeds 0 to 9999
    python tests/simulation/run.py --soak 600              seeds from the clock on, for ten minutes
    python tests/simulation/run.py --seed 7 --strict --trace

A step is one event that the broker's core or a peer was given: a message that it handled, a timer of a peer, the loss
of a connection, a tick of the core. Ticks in which nothing was due are counted among them and shown apart. Steps a
second are over wall time, start and checks included, and over the time of the processors that did the work.

Seeds that fail are added to regressions.txt, which the tests run first. Exit 1 where one fails.
"""

import argparse
import gc
import json
import os
import selectors
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulation.scenario import Result, simulate

REGRESSIONS = Path(__file__).with_name("regressions.txt")
BATCH = 10  # seeds between two lines of a worker


class Sum:
    """What many runs did."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: dict[int, str] = {}

    def add(self, result: Result) -> None:
        self.counts.update(
            {"seeds": 1, "steps": result.steps, "idle ticks": result.ticks, "tokens read": result.tokens}
        )
        for group in ("ended", "texts", "counts", "faults", "executions"):
            for name, count in getattr(result, group).items():
                self.counts[f"{group} {name}"] += count

    def fail(self, seed: int, text: str) -> None:
        self.counts["seeds"] += 1
        self.failed[seed] = text

    def data(self) -> dict[str, Any]:
        return {"counts": self.counts, "failed": self.failed}

    def join(self, data: dict[str, Any]) -> None:
        self.counts.update(data["counts"])
        self.failed.update({int(seed): text for seed, text in data["failed"].items()})

    def group(self, name: str) -> dict[str, int]:
        """Counts of one of the groups, the highest first."""
        found = {key.removeprefix(f"{name} "): n for key, n in self.counts.most_common() if key.startswith(f"{name} ")}
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def work(first: int, step: int, count: int, until: float, strict: bool) -> None:
    """Seeds first, first + step ... in this process, a line of JSON for each few."""
    gc.freeze()
    done = Sum()
    for number in range(count):
        if until and time.time() > until:
            break
        seed = first + number * step
        try:
            done.add(simulate(seed, strict=strict))
        except Exception:
            done.fail(seed, traceback.format_exc())
        if done.counts["seeds"] >= BATCH:
            print(json.dumps(done.data()), flush=True)
            done = Sum()
            gc.collect()
    print(json.dumps(done.data()), flush=True)


def run(first: int, count: int, *, jobs: int, seconds: float = 0.0, strict: bool = False, show: bool = False) -> Sum:
    """Seeds from `first` on, in so many processes; `count` of them, or for so many seconds.

    Raises:
        RuntimeError: a process ended before its work.
    """
    total = Sum()
    started = shown = time.time()
    until = started + seconds if seconds else 0.0
    many = -(-count // jobs)
    command = [sys.executable, __file__, "--work", "--step", str(jobs), "--until", str(until)]
    command += ["--strict"] if strict else []
    with selectors.DefaultSelector() as ready:
        for job in range(jobs):
            part = [*command, "--first", str(first + job), "--seeds", str(min(many, len(range(job, count, jobs))))]
            child = subprocess.Popen(part, stdout=subprocess.PIPE, text=True)
            ready.register(child.stdout, selectors.EVENT_READ, child)  # type: ignore[arg-type]
        while ready.get_map():
            for key, _ in ready.select():
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if line:
                    total.join(json.loads(line))
                    continue
                ready.unregister(key.fileobj)
                if key.data.wait():
                    raise RuntimeError(f"a process of the simulation ended with {key.data.returncode}")
            if show and time.time() - shown > 5:
                shown = time.time()
                print(progress(total, shown - started), flush=True)
    return total


def progress(total: Sum, seconds: float) -> str:
    """One line."""
    counts = total.counts
    rate = counts["steps"] / seconds
    return (
        f"{seconds:6.0f} s {counts['seeds']} seeds, {counts['steps']} steps, {rate:,.0f}/s, {len(total.failed)} failed"
    )


def report(total: Sum, seconds: float) -> str:
    """All that there is to say."""
    times = os.times()
    busy = times.children_user + times.children_system
    counts = total.counts
    lines = [
        f"seeds       {counts['seeds']:,}",
        f"steps       {counts['steps']:,}, of them {counts['idle ticks']:,} ticks in which nothing was due",
        f"steps/s     {counts['steps'] / seconds:,.0f} in {seconds:.0f} s; {counts['steps'] / busy:,.0f} a processor",
        f"tokens read {counts['tokens read']:,}",
    ]
    names = {
        "faults": "faults",
        "ended": "requests ended",
        "texts": "texts ended",
        "executions": "requests by times that a worker began with them",
        "counts": "the brokers' counters, and messages by kind",
    }
    for name, title in names.items():
        found = total.group(name)
        lines += [f"{title}: {sum(found.values()):,}", "    " + ", ".join(f"{n:,} {what}" for what, n in found.items())]
    return "\n".join([*lines, f"failed      {len(total.failed)} {sorted(total.failed)[:20] or ''}"])


def keep(seeds: list[int]) -> None:
    """Adds seeds to the regressions."""
    known = regressions()
    with REGRESSIONS.open("a", encoding="utf-8") as file:
        file.writelines(f"{seed}\n" for seed in seeds if seed not in known)


def regressions() -> list[int]:
    """Seeds that failed once."""
    if not REGRESSIONS.is_file():
        return []
    return [
        int(line.split("#")[0]) for line in REGRESSIONS.read_text("utf-8").splitlines() if line.split("#")[0].strip()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS", help="seeds from the clock on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--strict", action="store_true", help="look at the whole state after each message")
    parser.add_argument("--trace", action="store_true", help="print every message")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.first, options.step, options.seeds, options.until, options.strict)
        return 0
    if options.seed is not None:
        trace = print if options.trace else None
        print(simulate(options.seed, trace, strict=options.strict, digest=True))
        return 0
    started = time.time()
    first, count = (int(started), 10**9) if options.soak else (options.first, options.seeds)
    total = run(first, count, jobs=options.jobs, seconds=options.soak, strict=options.strict, show=True)
    for text in list(total.failed.values())[:3]:
        print(text, file=sys.stderr)
    print(report(total, time.time() - started))
    keep(sorted(total.failed))
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
