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
    bench: Callable[..., Awaitable[list[Any]]],
    show: Callable[[list[Any], Console], None],
    arguments: Sequence[str] | None,
    *,
    model: bool = False,
) -> int:
    """`ralmq bench NAME [--quick] [--json]`: exit code 0, or 1 where it failed.

    Args:
        bench: called with `quick`, True for a shorter run; returns dataclasses.
        show: prints them as a table.
        model: whether `bench` is called with a `model` as well, which `--model DIR` names instead of the embedded one.
    """
    parser = argparse.ArgumentParser(prog=f"ralmq bench {name}")
    parser.add_argument("--quick", action="store_true", help="shorter, rougher")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    if model:
        parser.add_argument("--model", default="demo", help="a model directory with a tokenizer")
    options = parser.parse_args(arguments)
    given = {"model": options.model} if model else {}
    try:
        rows = asyncio.run(_measured(bench(quick=options.quick, **given)))
    except RalmqError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"bench": name, "cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}))
    else:
        show(rows, Console())
    return 0


async def _measured(bench: Awaitable[list[Any]]) -> list[Any]:
    return await bench
