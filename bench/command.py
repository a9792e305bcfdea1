"""What the benches of models share: options, one JSON document or a table, an exit code. Knows no measurement."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ..schema.errors import RalmqError


def run(
    name: str,
    bench: Callable[[bool], Awaitable[list[Any]]],
    show: Callable[[list[Any], Console], None],
    arguments: Sequence[str] | None,
) -> int:
    """`ralmq bench NAME [--quick] [--json]`: exit code 0, or 1 where it failed.

    Args:
        bench: measures, shorter where its argument is True; returns dataclasses.
        show: prints them as a table.
    """
    parser = argparse.ArgumentParser(prog=f"ralmq bench {name}")
    parser.add_argument("--quick", action="store_true", help="shorter, rougher")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args(arguments)
    try:
        rows = asyncio.run(_measured(bench, options.quick))
    except RalmqError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"bench": name, "cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}))
    else:
        show(rows, Console())
    return 0


async def _measured(bench: Callable[[bool], Awaitable[list[Any]]], quick: bool) -> list[Any]:
    return await bench(quick)
