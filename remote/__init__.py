"""Torch modules and tensors on workers, and training through them. On top of client/ and workers/.

`ralmq.remote("registry.name", worker)` builds a module on a worker: this package can be called. It imports torch only
then.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_NAMES = {
    "DataParallel": "replicas",
    "Pipeline": "pipeline",
    "RemoteModule": "proxy",
    "RemoteOptimizer": "optimizer",
    "RemoteTensor": "tensor",
    "close": "home",
    "connect": "home",
    "from_pretrained": "model.pretrained",
    "remote_copy": "proxy",
    "to_worker": "tensor",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'ralmq.remote' has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


class _Room(ModuleType):
    def __call__(self, name: str, worker: str, *values: Any, **options: Any) -> Any:
        """A module that the worker builds by its name in the registry; see `proxy.built`."""
        if values:
            raise TypeError(f"give the arguments of {name} by name, as in_features=4: {len(values)} came without one")
        return import_module(".proxy", __name__).built(name, worker, **options)


sys.modules[__name__].__class__ = _Room
