"""Worker classes by name: built in, `module:Class`, or an entry point. Imports a class when it is asked for."""

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, TypeVar

from ..schema.errors import Refused
from .base import Worker

T = TypeVar("T")

GROUP: Final = "ralmq.workers"
BUILT_IN: Final = {
    "echo": "ralmq.workers.echo:Echo",
    "stage": "ralmq.workers.stage.worker:Stage",
    "index": "ralmq.workers.search.worker:Index",
    "generator": "ralmq.workers.generator.worker:Generator",
    "encoder": "ralmq.workers.encoder.worker:Encoder",
    "t5-encoder": "ralmq.workers.encoder.states:StateEncoder",
    "module": "ralmq.remote.worker:ModuleWorker",
    "ralm-gateway": "ralmq.workers.gateway:RalmGateway",
}


def find(name: str) -> type[Worker]:
    """The worker class of that name.

    Raises:
        Refused: no such worker, no such module or class, or a class that is no Worker.
    """
    if name in BUILT_IN:
        return imported(BUILT_IN[name], Worker, "ralmq.Worker")
    if ":" in name:
        look_here()
        return imported(name, Worker, "ralmq.Worker")
    found = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join([*BUILT_IN, *found])
        raise Refused(f"no worker is called {name}: there are {known}; or give module:Class")
    return imported(found[name], Worker, "ralmq.Worker")


def imported(target: str, base: type[T], called: str) -> type[T]:
    """The class `module:Class`.

    Raises:
        Refused: no such module or class, or one that is no subclass of `base`, which messages call `called`.
    """
    module_name, _, class_name = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise Refused(f"{target} names no class: give module:Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise Refused(f"cannot import {module_name} ({error}): install its package, or correct the name") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        raise Refused(f"{target} is no subclass of {called}: name one, as module:Class")
    return found


def look_here() -> None:
    """From now on a module in the current folder is found, as with `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
