"""`ralmq bench`: starts a measurement of bench/. Knows their names only."""

from importlib import import_module
from typing import Annotated

import typer

from .shared import Json, show_help, without_keys

bench = typer.Typer(
    help="Measure this machine: bound, measured, ok.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
Quick = Annotated[bool, typer.Option("--quick", help="Shorter and rougher.")]
Model = Annotated[str, typer.Option("--model", help="A model directory with a tokenizer, or demo.")]


@bench.callback()
def _group(context: typer.Context) -> None:
    """Measure this machine: bound, measured, ok."""
    show_help(context)


@bench.command()
def broker(quick: Quick = False, as_json: Json = False) -> int:
    """Request and reply through the broker, against libzmq's proxy and a zmq.asyncio broker."""
    return _run("broker", quick, as_json)


@bench.command()
def pipeline(model: Model = "demo", quick: Quick = False, as_json: Json = False) -> int:
    """Tokens a second of a model over one, two and three stages, with 1, 4 and 16 sequences; and idle time."""
    return _run("pipeline", quick, as_json, "--model", model)


@bench.command()
def engine(quick: Quick = False, as_json: Json = False) -> int:
    """One span on one CPU thread, against transformers and CTranslate2 where installed; and its loading."""
    return _run("engine", quick, as_json)


@bench.command()
def retrieval(quick: Quick = False, as_json: Json = False) -> int:
    """What kNN retrieval costs a generation, by interval and staleness."""
    return _run("retrieval", quick, as_json)


@bench.command()
def parallel(model: Model = "demo", quick: Quick = False, as_json: Json = False) -> int:
    """Tokens a second of a model over stages, and over the processes of a stage that share its layers."""
    return _run("parallel", quick, as_json, "--model", model)


@bench.command()
def gpu(
    size: Annotated[str, typer.Option("--size", help="Of a Llama with random weights: 1b, 3b, 8b.")] = "1b",
    as_json: Json = False,
) -> int:
    """A whole model on a GPU, against transformers and the bandwidth of its memory; says so where there is none."""
    return _run("gpu", False, as_json, "--size", size)


def _run(name: str, quick: bool, as_json: bool, *more: str) -> int:
    without_keys()
    arguments = [*more, *(["--quick"] if quick else []), *(["--json"] if as_json else [])]
    return int(import_module(f"ralmq.bench.{name}").main(arguments))
