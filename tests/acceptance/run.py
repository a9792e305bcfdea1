"""Runs the acceptance checks and prints bound, measured, ok: `python tests/acceptance/run.py [--quick] [NAME ...]`.

What they find goes into docs/performance.md, in place of what the same checks found before. They time things on this
machine and want it for themselves, so CI does not run them, but for those that only count: `--quick` runs these in a
small size and writes nothing. Exit 1 where a bound is missed.
"""

import asyncio
import importlib
import sys
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from checks import CHECKS, COUNTED, QUICK, Line  # noqa: E402
from performance import keep_checks  # noqa: E402


async def lines_of(name: str) -> list[Line]:
    """The lines of one check; what it raises is a line, too."""
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="ralmq-acceptance-") as folder:
        try:
            async for line in CHECKS[name](Path(folder)):
                lines.append(line)
        except Exception as error:
            traceback.print_exc()
            lines.append(Line(name, "no error", f"{type(error).__name__}: {error}"[:200], False))
    return lines


def main() -> int:
    for path in sorted(HERE.glob("check_*.py")):
        importlib.import_module(path.stem)
    names = [name for name in sys.argv[1:] if name != "--quick"] or (COUNTED if QUICK else list(CHECKS))
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"no check is called {', '.join(unknown)}: there are {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    table = Table("check", "what", "bound", "measured", "ok")
    good = True
    console = Console()
    for name in names:
        with console.status(name):
            lines = asyncio.run(lines_of(name))
        if not QUICK:
            keep_checks({name: lines})
        for line in lines:
            good &= line.ok or not line.required
            table.add_row(name, line.what, line.bound, line.measured, "[green]yes" if line.ok else "[red]NO")
    console.print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
