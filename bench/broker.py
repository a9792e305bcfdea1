"""Request and reply through the broker against libzmq's C proxy and a plain zmq.asyncio broker, as ratios.

Knows what is measured and which bounds hold. All systems run at once, each with a load of its own; they are measured
in turn, one at a time, many short rounds over, so that what else the machine does hits all of them alike. A ratio is
the median over the rounds of the ratio within a round.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from .load import LoadFailed, NoCompiler, Tally, load_command
from .report import Check, Report, Row, show
from .systems import ASYNCIO, BROKER, POLLED, PROXY, RALMQ, Cpu, System, busy_seconds, commands

SIZES = (0, 4 << 10, 64 << 10, 1 << 20)
WINDOWS = (32, 32, 16, 4)  # requests that each client keeps open: 4 MiB are under way at 64 KiB, 16 MiB at 1 MiB
LABELS = ("0 B", "4 KiB", "64 KiB", "1 MiB")
PEERS = 4  # clients, and as many workers


@dataclass
class Sample:
    """One system at one size in one round."""

    tally: Tally
    cpu: Cpu


def measure(system: System, place: int, seconds: float) -> Sample:
    before = system.cpu()
    tally = system.load.run(place, window=WINDOWS[place], seconds=seconds)
    return Sample(tally, system.cpu() - before)


def idle(systems: Sequence[System], seconds: float) -> tuple[dict[str, float], float]:
    """With all peers connected and silent: percent of a core that each broker uses, all threads, and cores in use."""
    before = {system.name: system.cpu() for system in systems}
    busy = busy_seconds()
    start = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - start
    percent = {system.name: 100 * sum(system.cpu() - before[system.name]) / passed for system in systems}
    return percent, (busy_seconds() - busy) / passed


def row_of(place: int, samples: dict[str, list[Sample]]) -> Row:
    row = Row(SIZES[place], LABELS[place], WINDOWS[place])
    for name, taken in samples.items():
        row.rate[name] = statistics.median(sample.tally.rate for sample in taken)
        answered = max(1, sum(sample.tally.answered for sample in taken))
        row.main_cpu_us[name] = 1e6 * sum(sample.cpu.main for sample in taken) / answered
        row.other_cpu_us[name] = 1e6 * sum(sample.cpu.others for sample in taken) / answered
        if name != RALMQ:
            pairs = zip(samples[RALMQ], taken, strict=True)
            row.ratios[name] = [own.tally.rate / other.tally.rate if other.tally.rate else 0.0 for own, other in pairs]
            row.ratio[name] = statistics.median(row.ratios[name])
    return row


def checks_of(rows: Sequence[Row], idle_percent: dict[str, float], faults: int) -> list[Check]:
    found: list[Check] = []

    def at_least(name: str, bound: float, measured: float, *, required: bool = True) -> None:
        found.append(Check(name, f">= {bound:.2f}", measured, measured >= bound, required))

    def at_most(name: str, bound: float, measured: float, unit: str = "", *, required: bool = True) -> None:
        found.append(Check(name, f"<= {bound:g}{unit}", measured, measured <= bound, required))

    row = rows[1]
    for name in (ASYNCIO, POLLED):
        if name in row.ratio:
            at_least(f"{row.label}: rate, of the {name} broker's", 5.0, row.ratio[name], required=name == POLLED)
    for place, bound, required in ((1, 0.70, True), (2, 0.85, True), (0, 0.30, False), (3, 0.75, False)):
        if PROXY in rows[place].ratio:
            at_least(f"{LABELS[place]}: rate, of the C proxy's", bound, rows[place].ratio[PROXY], required=required)
    cpu = row.main_cpu_us
    if cpu.get(ASYNCIO):
        at_most(f"{row.label}: main-thread CPU, of zmq.asyncio's", 0.25, cpu[RALMQ] / cpu[ASYNCIO])
    at_most(f"{row.label}: main-thread CPU a round trip", 12, cpu[RALMQ], " us", required=False)
    at_most(f"idle CPU, {2 * PEERS} peers", 2, idle_percent[RALMQ], " %")
    at_most("requests lost, crossed or refused", 0, faults)
    return found


def bench(
    *,
    quick: bool = False,
    broker: Sequence[str] = BROKER,
    python_load: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Runs it all: about two minutes, or 20 s where `quick`.

    Args:
        broker: how the broker is started; its address is appended.
        python_load: the load in Python, also where a compiler is at hand.
        progress: told how many of how many measurements are done.

    Raises:
        LoadFailed: a broker did not come up, or a load ended.
    """
    rounds, seconds = (3, 0.25) if quick else (7, 0.8)
    note = "asked for" if python_load else ""
    try:
        command = load_command(python=python_load)
    except NoCompiler as error:
        command, note, python_load = load_command(python=True), str(error), True
    samples: dict[int, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        started = commands(broker)
        systems = [stack.enter_context(System(name, line, command, SIZES)) for name, line in started.items()]
        for system in systems:
            for place in range(len(SIZES)):
                system.load.run(place, window=WINDOWS[place], seconds=0.2)
        idle_percent, in_use = idle(systems, 2.0 if quick else 5.0)
        done, total = 0, rounds * len(SIZES) * len(systems)
        for number in range(rounds):
            for place in range(len(SIZES)):
                for turn in range(len(systems)):
                    system = systems[(turn + number) % len(systems)]
                    samples[place][system.name].append(measure(system, place, seconds))
                    done += 1
                    progress(done, total)
    rows = [row_of(place, samples[place]) for place in range(len(SIZES))]
    every = [(name, sample.tally) for taken in samples.values() for name, group in taken.items() for sample in group]
    faults = {system.name: sum(tally.faults for name, tally in every if name == system.name) for system in systems}
    return Report(
        load="python" if python_load else "c",
        load_note=note,
        cores=os.cpu_count() or 1,
        rounds=rounds,
        seconds=seconds,
        rows=rows,
        idle_cpu_percent=idle_percent,
        cores_in_use=in_use,
        faults=faults,
        notes=sorted({f"{name}: {tally.note}" for name, tally in every if tally.note}),
        checks=checks_of(rows, idle_percent, faults[RALMQ]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ralmq.bench.broker [--quick] [--json]`: exit code 0, or 1 where a bound is missed or it failed."""
    parser = argparse.ArgumentParser(prog="ralmq bench broker")
    parser.add_argument("--quick", action="store_true", help="20 seconds, rougher")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--broker", nargs="+", default=BROKER, help="how the broker is started, without its address")
    parser.add_argument("--python-load", action="store_true", help="the load in Python, as where no compiler is found")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes it has started end with it
    try:
        report = bench(quick=options.quick, broker=options.broker, python_load=options.python_load)
    except LoadFailed as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report.document()))
    else:
        show(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
