"""The face: what a user imports. Loads what is asked for, when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .client.client import Client as Client
    from .client.client import connect as connect
    from .client.generation import Generation as Generation
    from .client.results import Hits as Hits
    from .client.results import Reply as Reply
    from .client.results import Token as Token
    from .client.stream import Stream as Stream
    from .workers.base import Request as Request
    from .workers.base import Worker as Worker
    from .workers.hooks import LogitsHook as LogitsHook

__version__ = "0.1.0"

_FACE = {
    "Client": "client.client",
    "Generation": "client.generation",
    "Hits": "client.results",
    "LogitsHook": "workers.hooks",
    "Reply": "client.results",
    "Request": "workers.base",
    "Stream": "client.stream",
    "Token": "client.results",
    "Worker": "workers.base",
    "connect": "client.client",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("ralmq.errors")
    if name not in _FACE:
        raise AttributeError(f"module 'ralmq' has no attribute {name!r}")
    return getattr(import_module(f"ralmq.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_FACE, "__version__", "errors"])
