"""What the workers of this room have in common: a model in a thread of its own, and a service named after it."""

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import torch

from ...schema.errors import Refused
from ...schema.limits import MAX_NAME
from ..base import Worker
from ..engine.errors import CheckpointError
from ..models import resolve

SAMPLES: Final = 8  # of each file of weights, spread over it
SAMPLE: Final = 64 << 10  # bytes of one

T = TypeVar("T")


class ModelWorker(Worker):
    """Serves `<what>:<name>`.

    Args:
        what: it does with texts.
        model: a Hugging Face directory.
        name: the directory's name where it is empty.
        threads: of torch.

    Raises:
        Refused: no such directory, or a name that is too long.
    """

    idempotent = True

    def __init__(self, what: str, model: str, name: str, threads: int) -> None:
        known, self._path = resolve(model)
        self._name = name or known
        self.service = f"{what}:{self._name}"
        if len(self.service) > MAX_NAME:
            raise Refused(f"the name {self._name} is too long: give a shorter one with -o name=")
        self._compute = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))

    async def _loaded(self, load: Callable[[], T]) -> T:
        """What `load` makes, in the compute thread.

        Raises:
            Refused: something in the directory is not what it should be.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, load)
        except CheckpointError as error:
            raise Refused(str(error)) from None

    async def stop(self) -> None:
        self._compute.shutdown(wait=False, cancel_futures=True)

    def _fingerprint(self) -> str:
        """16 hex digits that are equal for copies of a model's directory.

        Hashes the tokenizer, and of each file of weights its name, its size and samples of its bytes: the header with
        names and shapes among them.
        """
        digest = hashlib.sha256()
        for file in (*sorted(self._path.glob("*.safetensors")), *self._path.glob("tokenizer.json")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as stream:
                for part in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE) * part // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE))
        return digest.hexdigest()[:16]
