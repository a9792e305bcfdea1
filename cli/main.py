"""The command `ralmq`: which commands there are. Imports nothing heavy: --help is instant."""

import os
from typing import Annotated

import typer

from .ask import search, status
from .bench import bench
from .demo import demo
from .failures import DEBUG, Commands
from .generate import WithDefaults, generate
from .index import index
from .join import join
from .keys import keys
from .local import down, logs, up
from .map import map_file
from .plan import plan
from .quarantine import drain, quarantine
from .serve import broker, worker
from .shared import show_help
from .split import split
from .worker_help import WorkerCommand

app = typer.Typer(
    cls=Commands,
    help="Retrieval-augmented language models over ZeroMQ.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"ralmq {version('ralmq')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"  # the processes that a command starts see it too
    show_help(context)


for command in (demo, plan, up, join, down, status, logs, broker):
    app.command()(command)
app.command(cls=WorkerCommand)(worker)
app.command(cls=WithDefaults)(generate)
for late in (search, drain, split):
    app.command()(late)
app.command("map")(map_file)
app.add_typer(index, name="index")
app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")
app.add_typer(quarantine, name="quarantine")
