"""`ralmq worker NAME --help`: the options of that worker, as its class declares and describes them. Knows no worker."""

import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from typer.core import TyperCommand

from ..schema.errors import Refused

INDENT: Final = " " * 4
_ARGUMENT: Final = re.compile(INDENT + r"(\w+(?:, \w+)*): (.*)")
NAMES: Final = {"Path": "path", "NoneType": "none", "bool": "true|false"}


class Described(NamedTuple):
    """One option of a worker: `-o name=`, what may stand behind it, what if it is not given, and what it does."""

    name: str
    kind: str
    default: str
    words: str


class WorkerCommand(TyperCommand):
    """Shows the options of the worker that is named on the line beside --help."""

    _named: str | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, left, _ = self.make_parser(ctx).parse_args(list(args))
        if option := next((text for text in left if "=" in text), None):
            raise Refused(f"{option} is an option of the worker: write -o {option}")
        self._named = given.get("kind") if isinstance(given.get("kind"), str) else None
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        if self._named is None:
            return
        from ..workers.registry import find

        options = described(find(self._named))
        with formatter.section(f"Options of the worker {self._named}"):
            formatter.write_dl([(f"-o {each.name}=<{each.kind}>", _said(each)) for each in options] or [("none", "")])


def _said(option: Described) -> str:
    return f"{option.words}  [{option.default}]".strip()


def described(kind: type) -> list[Described]:
    """The options of a worker class: names, types and defaults by its `__init__`, words by its docstring."""
    words = _words(inspect.getdoc(kind) or "")
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    return [
        Described(name, type_name(hints.get(name, str)), _default(parameter.default), words.get(name, ""))
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def type_name(hint: Any) -> str:
    """An annotation as a user writes its values."""
    parts: Sequence[Any] = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, parts))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return "|".join(type_name(part) for part in parts if part is not type(None))
    if typing.get_origin(hint) is typing.Annotated:
        return type_name(parts[0])
    name = getattr(hint, "__name__", str(hint))
    return NAMES.get(name, name)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value == "":
        return "optional"
    if isinstance(value, bool):
        return f"default: {str(value).lower()}"
    return f"default: {value:g}" if isinstance(value, float) else f"default: {value}"


def _words(text: str) -> dict[str, str]:
    """What the `Args:` section of a docstring says of each name; one entry may be of several."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = text.partition("Args:\n")
    for line in section.splitlines():
        if line.strip() and not line.startswith(INDENT):
            break  # the next section
        match = _ARGUMENT.fullmatch(line)
        if match is not None:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".rstrip() for name in names}
    return found
