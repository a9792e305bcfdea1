"""`ralmq split`: a model directory in, one directory a stage out, with a progress bar. Knows no tensor."""

from pathlib import Path
from typing import Annotated

import typer


def split(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face model directory, or demo.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the stages' directories are written: OUT/0, ...")],
    stages: Annotated[int, typer.Option("--stages", min=1, help="Into how many parts of nearly equal depth.")],
) -> None:
    """Cut a model into one directory a stage, for machines that hold only a part."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ..workers.engine.split import split as cut
    from ..workers.models import resolve

    name, directory = resolve(model)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))

    def told(done: int, total: int) -> None:
        if not bars.tasks:  # bad input is refused before the first bar
            bars.add_task("split")
            bars.start()
        bars.update(bars.tasks[0].id, completed=done, total=total)

    try:
        made = cut(directory, stages, out.expanduser(), told)
    finally:
        if bars.tasks:
            bars.stop()
    typer.echo("serve each on its machine:")
    for place, folder in enumerate(made):
        typer.echo(f"  ralmq worker stage -o model={folder} -o stage={place}/{stages} -o name={name} --broker URL")
