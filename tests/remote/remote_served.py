"""What the tests of remote modules look at from outside. Knows no test."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from inprocess import Cluster
from ralmq.remote.home import Home
from ralmq.remote.worker import ModuleWorker

NAMES = ("one", "two", "three")


@dataclass
class Served:
    """What the tests look at from outside."""

    home: Home
    cluster: Cluster
    workers: dict[str, ModuleWorker]
    models: Path  # the folder in which the worker three has models
    loop: asyncio.AbstractEventLoop = field(repr=False, default_factory=asyncio.new_event_loop)

    @property
    def url(self) -> str:
        return self.cluster.url

    def held(self, name: str) -> int:
        """Values that a worker has."""
        return self.workers[name].held
