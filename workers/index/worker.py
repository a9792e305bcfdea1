"""The built-in worker `index`: an index directory served as `search:<name>`. What it answers is in answer.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ...schema.errors import Refused
from ..base import Answer, Request, Worker
from .answer import answer
from .manifest import valid_name
from .store import OpenIndex, open_index


class Index(Worker):
    """The built-in worker `index`.

    Args:
        index: the directory that `ralmq index build` wrote.
        name: the service is search:<name>; by default the name in the manifest.
        threads: what one search may use.

    Raises:
        Refused: a name or a number of threads that cannot be. `start` raises ManifestError, which is one too.
    """

    idempotent = True
    capacity = 4  # searches that run at a time, each in a thread of its own

    def __init__(self, *, index: Path, name: str = "", threads: int = 1) -> None:
        if name and not valid_name(name):
            raise Refused(f"-o name={name}: a name is 1 to 64 letters, digits, '.', '_' or '-'")
        if threads < 1:
            raise Refused(f"-o threads={threads}: give at least 1")
        self._path = index.expanduser()
        self._name = name
        self._threads = threads
        self._index: OpenIndex | None = None

    async def start(self) -> None:
        """Reads the index; only then is its service announced. Raises ManifestError."""
        self._index = await asyncio.to_thread(open_index, self._path, self._threads)
        self.service = f"search:{self._name or self._index.manifest.name}"

    async def handle(self, request: Request) -> Answer:
        """See `answer`. The search runs beside the loop, so that beats and other requests go on."""
        assert self._index is not None
        arrays = [tensor.numpy() for tensor in request.tensors]
        search = asyncio.ensure_future(asyncio.to_thread(answer, self._index, request.body, arrays))
        try:
            return await asyncio.shield(search)
        except asyncio.CancelledError:
            await asyncio.wait([search])  # a thread cannot be cancelled: its credit comes back when it has ended
            if not search.cancelled():
                search.exception()  # seen, so that asyncio does not report it
            raise
