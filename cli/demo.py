"""`ralmq demo`: starts what demo/ shows. Knows its options only."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .shared import run, without_keys


def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DIR", help="Retrieve from the texts of this folder instead of numpy's."),
    ] = None,
) -> int:
    """Show the main job on the embedded model: a local cluster, generation without and with retrieval."""
    without_keys()
    code: int = run(import_module("ralmq.demo.run").main(folder=folder))
    return code
