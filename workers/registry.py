"""Worker classes by name: built in, `module:Class`, or an entry point. Imports a class when it is asked for."""

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from ..schema.errors import Refused
from .base import Worker

GROUP: Final = "ralmq.workers"
BUILT_IN: Final = {
    "echo": "ralmq.workers.echo:Echo",
    "stage": "ralmq.workers.stage.worker:Stage",
    "index": "ralmq.workers.index.worker:Index",
    "generator": "ralmq.workers.generator.worker:Generator",
}


def find(name: str) -> type[Worker]:
    """The worker class of that name.

    Raises:
        Refused: no such worker, no such module or class, or a class that is no Worker.
    """
    if name in BUILT_IN:
        return _imported(BUILT_IN[name])
    if ":" in name:
        here = str(Path.cwd())
        if here not in sys.path:  # a module in the current folder is found, as with `python -m`
            sys.path.insert(0, here)
        return _imported(name)
    found = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join([*BUILT_IN, *found])
        raise Refused(f"no worker is called {name}: there are {known}; or give module:Class")
    return _imported(found[name])


def _imported(target: str) -> type[Worker]:
    module_name, _, class_name = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise Refused(f"{target} names no class: give module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise Refused(f"cannot import {module_name} ({error}): install its package, or correct the name") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Worker):
        raise Refused(f"{target} is no subclass of ralmq.Worker: name one, as module:Class")
    return found
