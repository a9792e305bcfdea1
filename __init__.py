"""The face: what a user imports. Loads what is asked for, when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .client.client import Client as Client
    from .client.client import connect as connect
    from .client.generation import Generation as Generation
    from .client.mapping import map_rows as map_rows
    from .client.results import Hits as Hits
    from .client.results import Reply as Reply
    from .client.results import Token as Token
    from .client.stream import Stream as Stream
    from .remote.model.language import RemoteLanguageModel as RemoteLanguageModel
    from .remote.model.pretrained import from_pretrained as from_pretrained
    from .remote.optimizer import RemoteOptimizer as RemoteOptimizer
    from .remote.proxy import RemoteModule as RemoteModule
    from .remote.proxy import remote_copy as remote_copy
    from .remote.replicas import DataParallel as DataParallel
    from .remote.tensor import RemoteTensor as RemoteTensor
    from .workers.base import Request as Request
    from .workers.base import Worker as Worker
    from .workers.group.errors import RankLost as RankLost
    from .workers.group.errors import RankMissing as RankMissing
    from .workers.group.group import Group as Group
    from .workers.group.group import SyncGroup as SyncGroup
    from .workers.group.group import group as group
    from .workers.hooks import LogitsHook as LogitsHook

__version__ = "0.1.0"

_FACE = {
    "Client": "client.client",
    "DataParallel": "remote.replicas",
    "Generation": "client.generation",
    "Group": "workers.group.group",
    "Hits": "client.results",
    "LogitsHook": "workers.hooks",
    "RankLost": "workers.group.errors",
    "RankMissing": "workers.group.errors",
    "RemoteLanguageModel": "remote.model.language",
    "RemoteModule": "remote.proxy",
    "RemoteOptimizer": "remote.optimizer",
    "RemoteTensor": "remote.tensor",
    "Reply": "client.results",
    "Request": "workers.base",
    "Stream": "client.stream",
    "SyncGroup": "workers.group.group",
    "Token": "client.results",
    "Worker": "workers.base",
    "connect": "client.client",
    "from_pretrained": "remote.model.pretrained",
    "group": "workers.group.group",
    "map_rows": "client.mapping",
    "remote_copy": "remote.proxy",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "remote"):
        return import_module(f"ralmq.{name}")
    if name not in _FACE:
        raise AttributeError(f"module 'ralmq' has no attribute {name!r}")
    return getattr(import_module(f"ralmq.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_FACE, "__version__", "errors", "remote"])
