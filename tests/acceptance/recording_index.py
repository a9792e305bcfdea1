"""The worker `index`, and what it was asked: {"recorded": true} gives the query vectors since the last time."""

from pathlib import Path

import numpy as np
from ralmq.workers.base import Answer, Request
from ralmq.workers.search.worker import Index


class Recording(Index):
    """Started with `ralmq worker recording_index:Recording`, where this file lies."""

    def __init__(self, *, index: Path) -> None:
        super().__init__(index=index)
        self._vectors: list[np.ndarray] = []

    async def handle(self, request: Request) -> Answer:
        if request.body.get("recorded"):
            taken, self._vectors = self._vectors, []
            return {"requests": len(taken)}, [np.concatenate(taken)] if taken else []
        if not request.body.get("info"):
            self._vectors.append(np.array(request.tensors[0].numpy()))
        return await super().handle(request)
