"""docs/performance.md: what was measured last, with plots. Knows lines and rows, and how none of them is measured.

`python tests/acceptance/performance.py [--quick] [NAME ...]` runs the benches (all, or those named), shows their tables
and renews their part of the page; run.py does the same for the acceptance checks. docs/performance.json keeps it all.
"""

import asyncio
import importlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checks import Line, Point
from plot import bars
from rich.console import Console

DOCS = Path(__file__).parents[2] / "docs"
BENCHES = ("broker", "pipeline", "engine", "retrieval")
VERSIONS = ("ralmq", "torch", "transformers", "numpy", "pyzmq", "faiss-cpu")
INTRO = """# Performance

Written by `make bench` and `make accept`; each part says when and where it was measured. Ratios are medians of the
ratios within interleaved rounds, so that what else the machine did hits both sides alike. Everything is one machine:
stages that share cores also share their memory's bandwidth.
"""


def machine() -> str:
    """Date, size of the machine and versions, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    where = f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB of memory, {platform.system()}"
    return f"{datetime.now(UTC):%Y-%m-%d}; {where}; Python {platform.python_version()}, {versions}"


def keep_checks(found: dict[str, list[Line]], docs: Path = DOCS) -> None:
    """Renews the parts of these checks, and the page."""
    measured = {name: {"where": machine(), "lines": [asdict(line) for line in lines]} for name, lines in found.items()}
    _renew("checks", measured, docs)


def keep_bench(name: str, rows: Sequence[Any], points: Sequence[Point], docs: Path = DOCS) -> None:
    """Renews the part of one bench, whose rows are dataclasses, and the page."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(type(row).__name__, []).append(asdict(row))
    part = {"where": machine(), "tables": tables, "points": [asdict(point) for point in points]}
    _renew("benches", {name: part}, docs)


def _renew(kind: str, parts: dict[str, Any], docs: Path) -> None:
    file = docs / "performance.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"benches": {}, "checks": {}}
    known[kind] = {**known[kind], **parts}
    file.write_text(json.dumps(known, indent=1, default=lambda value: value.item()) + "\n")
    write_page(known, docs)


def write_page(known: dict[str, Any], docs: Path) -> None:
    """The page and its plots, from what is known."""
    parts = [INTRO, _plots(known, docs)]
    for name in sorted(known["benches"]):
        bench = known["benches"][name]
        parts.append(f"## `ralmq bench {name}`\n\n{bench['where']}\n")
        parts += [_table(list(rows[0]), [list(row.values()) for row in rows]) for rows in bench["tables"].values()]
    if known["checks"]:
        parts.append("## Acceptance\n\nA bound in brackets is a target that decides nothing.\n")
    for name in sorted(known["checks"]):
        check = known["checks"][name]
        lines = [
            [line["what"], line["bound"], line["measured"], "yes" if line["ok"] else "**no**"]
            for line in check["lines"]
        ]
        parts.append(f"### {name.replace('_', ' ')}\n\n{check['where']}\n")
        parts.append(_table(["what", "bound", "measured", "ok"], lines))
    (docs / "performance.md").write_text("\n".join(parts))


def _plots(known: dict[str, Any], docs: Path) -> str:
    points = [Point(**point) for bench in known["benches"].values() for point in bench["points"]]
    points += [
        Point(**point) for check in known["checks"].values() for line in check["lines"] for point in line["points"]
    ]
    text = []
    (docs / "plots").mkdir(exist_ok=True)
    for old in (docs / "plots").glob("*.svg"):
        old.unlink()
    for title in dict.fromkeys(point.plot for point in points):
        heights = {(point.at, point.series): point.value for point in points if point.plot == title}
        file = "".join(letter if letter.isalnum() else "-" for letter in title.lower()) + ".svg"
        (docs / "plots" / file).write_text(bars(title, heights))
        text.append(f"![{title}](plots/{file})\n")
    return "\n".join(text)


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value).replace("|", "\\|")


def main() -> int:
    quick, names = "--quick" in sys.argv, [name for name in sys.argv[1:] if not name.startswith("-")]
    if unknown := set(names) - set(BENCHES):
        print(f"no bench is called {', '.join(unknown)}: there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    good = True
    for name in names or BENCHES:
        module = importlib.import_module(f"ralmq.bench.{name}")
        found = module.bench(quick=quick)
        if inspect.iscoroutine(found):
            rows = asyncio.run(found)
            module.show(rows, Console())
        else:
            module.show(found)
            rows, good = found.checks, good and found.ok
        keep_bench(name, rows, points_of(name, rows))
    return 0 if good else 1


def points_of(name: str, rows: Sequence[Any]) -> list[Point]:
    """What is plotted of a bench."""
    if name != "pipeline":
        return []
    found = [
        Point("Tokens per second, embedded model", f"{r.sequences} at a time", f"{r.stages} stages", r.tokens_per_s)
        for r in rows
    ]
    for row in rows:
        at = f"{row.stages} stages, {row.sequences} sequences"
        named = [(f"stage {place}", bubble) for place, bubble in enumerate(row.bubbles)]
        found += [Point("Bubble ratio of each stage", at, stage, bubble) for stage, bubble in named]
    return found


if __name__ == "__main__":
    sys.exit(main())
