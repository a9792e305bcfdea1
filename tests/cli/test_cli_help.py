"""What --help says of options: those of a worker by its class, those of a generation with what they are by default."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from ralmq.cli.main import app
from ralmq.cli.worker_help import described, type_name
from ralmq.client.generation import DEFAULTS
from ralmq.workers.base import Worker
from ralmq.workers.registry import BUILT_IN, find
from typer.testing import CliRunner


class Typed(Worker):
    """A worker.

    Args:
        path: where it lies,
            or where it will.
        count, share: how many: 1 or more.
        color: of it.

    Raises:
        limit: this is no option.
    """

    def __init__(
        self,
        *,
        path: Path,
        count: int = 1,
        share: float = 0.50,
        loud: bool = False,
        color: Literal["red", "blue"] | None = None,
        name: str = "",
        limit: Annotated[int, "most"] = 7,
        **others: Any,
    ) -> None: ...


def test_options_of_a_class() -> None:
    assert [tuple(option) for option in described(Typed)] == [
        ("path", "path", "required", "where it lies, or where it will."),
        ("count", "int", "default: 1", "how many: 1 or more."),
        ("share", "float", "default: 0.5", "how many: 1 or more."),
        ("loud", "true|false", "default: false", ""),
        ("color", "red|blue", "optional", "of it."),
        ("name", "str", "optional", ""),
        ("limit", "int", "default: 7", ""),
    ]
    assert described(Worker) == []
    assert type_name(int | str) == "int|str" and type_name(list[int]) == "list"


def helped(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, [*arguments], prog_name="ralmq")
    assert (done.exit_code, done.stderr) == (0, "")
    return " ".join(done.stdout.split())


def test_a_worker_s_help_lists_its_options() -> None:
    shown = helped("worker", "encoder", "--help")
    for part in (
        "Options of the worker encoder: -o model=<str> a Hugging Face directory",
        "-o pooling=<mean|cls> mean or cls",
        "-o normalize=<true|false> scale vectors to length 1, so that inner products are cosines. [default: true]",
        "-o batch=<int> texts that are computed at once, and requests that are taken together. [default: 32]",
    ):
        assert part in shown
    assert helped("worker", "-o", "a=b", "encoder", "-h").endswith(shown.partition("Options of")[2])
    assert "Options of the worker" not in helped("worker", "--help")
    assert "Options of the worker ralmq.workers.base:Worker: none" in helped(
        "worker", "ralmq.workers.base:Worker", "--help"
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_of_the_built_in_workers_is_described(name: str) -> None:
    options = described(find(name))
    assert options and [option.name for option in options if not option.words] == []


def test_an_unknown_worker_has_no_help() -> None:
    done = CliRunner().invoke(app, ["worker", "nobody", "--help"])
    assert done.exit_code == 2 and "no worker is called nobody" in done.stderr and done.stderr.count("\n") == 1


def test_a_generation_s_defaults_are_the_client_s() -> None:
    for _ in range(2):  # whatever is asked twice says it once
        shown = helped("generate", "--help")
    for name, value in DEFAULTS.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            said = re.search(rf"--{name.replace('_', '-')} .*?\[default: ([^\]]*)\]", shown)
            assert said is not None and json.loads(said[1]) == value, name
    assert shown.count("[default: knn]") == 1 and shown.count("[default: 64]") == 1
