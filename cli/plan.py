"""`ralmq plan`: which worker takes which layers of a model, why, and how fast that will be. Starts nothing."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ..schema.errors import Refused
from .shared import Json, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..schema.plan.plan import Plan
    from ..schema.plan.slots import Slot


def plan(
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="A model directory, or demo.")],
    worker: Annotated[
        list[str] | None,
        typer.Option(
            "--worker",
            metavar="NAME=MEM[,SPEED]",
            help="Memory, of several devices as cuda:0:20GiB+cpu:8GiB; GB/s of each as 900+12. Repeatable.",
        ),
    ] = None,
    kv_tokens: Annotated[int, typer.Option("--kv-tokens", min=1, help="Tokens whose keys and values are kept.")] = 4096,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16, fp16 or int8, as the stages have it.")] = "fp32",
    ordered: Annotated[bool, typer.Option("--ordered", help="Layers go to the workers as they are named.")] = False,
    as_json: Json = False,
) -> None:
    """Show the fastest split of a model over unequal workers, or what does not fit."""
    from ..schema.plan.plan import make_plan
    from ..schema.plan.slots import read_slots
    from ..workers.weigh import weigh

    slots = [slot for text in worker or () for slot in read_slots(text)]
    _check_names(slots)
    sizes = weigh(model, dtype)
    slots, guessed = _with_speeds(slots)
    made = make_plan(sizes, slots, kv_tokens=kv_tokens, ordered=ordered)
    if as_json:
        print_json({**made.as_map(), "assumed_speed": guessed})
        return
    from rich.console import Console

    Console().print(_table(made))
    for share in made.shares:
        typer.echo(f"{_called(share.slot)}: {share.why}")
    if guessed:
        typer.echo(f"no speed is given for {', '.join(guessed)}: that of this machine, measured now, is assumed")
    stages = len(made.used)
    typer.echo(
        f"predicted tokens/s: {made.alone:.3g} of one sequence, {made.together:.3g} of {stages} or more at a time"
    )


def _check_names(slots: "list[Slot]") -> None:
    if not slots:
        raise Refused("a plan needs a worker: give --worker NAME=MEMORY[,SPEED] at least once")
    seen: set[tuple[str, str]] = set()
    for slot in slots:
        if (slot.name, slot.device) in seen:
            raise Refused(f"--worker {slot.name} is given twice: give each worker once, several devices with +")
        seen.add((slot.name, slot.device))


def _with_speeds(slots: "list[Slot]") -> "tuple[list[Slot], list[str]]":
    """Where a worker has none, what this machine's processor is measured to have; and the names of those workers."""
    lacking = list(dict.fromkeys(slot.name for slot in slots if not slot.speed))
    if not lacking:
        return slots, []
    from ..workers.speed import measured

    speed = round(measured(), 1)
    return [slot if slot.speed else replace(slot, speed=speed) for slot in slots], lacking


def _table(made: "Plan") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from ..schema.plan.sizes import size_text

    load = made.load
    title = f"{load.model.name}: {load.layers} layers, {size_text(load.weights(0, load.layers))} of weights, "
    title += f"cache of {load.kv_tokens} tokens"
    table = Table(title=escape(title), title_justify="left")
    for column in ("worker", "layers", "weights", "cache", "memory", "GB/s", "ms a token"):
        table.add_column(column)
    for share in made.shares:
        slot = share.slot
        layers = f"{share.first}-{share.last - 1}" if share.used else "none"
        held = [size_text(count) for count in (share.weights, share.cache, slot.memory)]
        table.add_row(escape(_called(slot)), layers, *held, f"{slot.speed:.3g}", f"{share.seconds * 1000:.3g}")
    return table


def _called(slot: "Slot") -> str:
    return slot.name if slot.device == "cpu" else f"{slot.name} {slot.device}"
