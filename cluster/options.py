"""Whether the workers of a cluster file exist and have the options that it gives them, on whatever machine they are.

Reads the sources of built-in classes, so that nothing heavy is imported; of other classes it knows names alone.
"""

import ast
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ..workers.registry import BUILT_IN, GROUP
from .file import Path_, Source, Value, suggestion

KINDS: Final[dict[str, type]] = {"int": int, "float": float, "bool": bool}  # of options whose values are checked
SAID: Final = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def check_workers(source: Source) -> None:
    """Raises Refused, with the line, for a worker or an option that there is not."""
    for name, model in source.file.models.items():
        _check(source, "stage", model.options, ("models", name, "options"))
        for number, stage in enumerate(model.stages):
            _check(source, "stage", stage.options, ("models", name, "stages", number, "options"))
    for name, index in source.file.indexes.items():
        _check(source, "index", index.options, ("indexes", name, "options"))
    for number, extra in enumerate(source.file.workers):
        place: Path_ = ("workers", number)
        _check_name(source, extra.worker, (*place, "worker"))
        _check(source, extra.worker, extra.options, (*place, "options"))
        lacking = [key for key, (_, needed) in (declared(extra.worker) or {}).items() if needed]
        if missing := [key for key in lacking if key not in extra.options]:
            raise source.fault(place, f"{extra.worker} needs {missing[0]}: write options = {{ {missing[0]} = ... }}")


def _check_name(source: Source, worker: str, place: Path_) -> None:
    if ":" in worker:
        if not all(part.isidentifier() for part in worker.replace(":", ".").split(".")) or worker.count(":") > 1:
            raise source.fault(place, f"{worker!r} names no class: write module:Class")
        return
    known = [*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))]
    if worker not in known:
        said = f"no worker is called {worker!r} (one of your own is written module:Class)"
        raise source.fault(place, f"{said}{suggestion(worker, known)}")


def _check(source: Source, worker: str, options: Mapping[str, Value], place: Path_) -> None:
    known = declared(worker)
    if known is None:
        return
    for key, value in options.items():
        if key not in known:
            raise source.fault((*place, key), f"{worker} has no option {key}{suggestion(key, list(known))}")
        kind = known[key][0]
        if kind in KINDS and not _fits(KINDS[kind], value):
            raise source.fault((*place, key), f"{key} of {worker} should be {SAID[kind]}, not {value!r:.60}")


def _fits(kind: type, value: Value) -> bool:
    if isinstance(value, str):  # as behind -o, where all values are texts
        try:
            return kind is bool or kind(value) is not None
        except ValueError:
            return False
    if kind is float:
        return not isinstance(value, bool)
    return type(value) is kind or (kind is int and isinstance(value, float) and value.is_integer())


@cache
def declared(worker: str) -> dict[str, tuple[str, bool]] | None:
    """The options of a built-in worker: how each is annotated, and whether it must be given. None for other workers."""
    if worker not in BUILT_IN:
        return None
    module, _, name = BUILT_IN[worker].partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    made = next(node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {
        argument.arg: (ast.unparse(argument.annotation) if argument.annotation else "str", default is None)
        for argument, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
    }
