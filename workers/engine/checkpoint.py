"""Tensors by name in a directory of safetensors files, each read from disk when asked for; knows no model."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CheckpointError
from .headers import SLAB, Entry, Headers

ALIGNED = 64  # rows of a piece that is read are a multiple of this
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint(Headers):
    """The tensors that Headers names, read; nothing is read before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.read = 0  # bytes of tensors that were asked for

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """One tensor, read into memory of its own; with `shape`, a tensor of another shape is refused."""
        file, entry, dtype = self._checked(name, shape)
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        with file.open("rb") as stream:
            stream.seek(entry.begin)
            self._read(stream, data, name)
        return data.view(dtype).view(entry.shape)

    def slabs(self, name: str, shape: tuple[int, ...], *, whole: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor of exactly this shape, a few MiB at a time: (number of the first row, rows as they are stored).

        With `whole` it is one piece. Each piece, also of another tensor, lies in the memory of the one before: fresh
        memory for each would leave the heap full of holes, and the process larger than its tensors.
        """
        file, entry, dtype = self._checked(name, shape)
        width = prod(shape[1:]) * dtype.itemsize
        count = shape[0] if whole else min(shape[0], max(1, SLAB // max(1, width) // ALIGNED) * ALIGNED)
        if len(self._buffer) < count * width:
            self._buffer = torch.empty(max(SLAB, count * width), dtype=torch.uint8)
        with file.open("rb") as stream:
            stream.seek(entry.begin)
            for start in range(0, shape[0], max(1, count)):
                rows = min(count, shape[0] - start)
                data = self._buffer[: rows * width]
                self._read(stream, data, name)
                yield start, data.view(dtype).view(rows, *shape[1:])

    def _checked(self, name: str, shape: tuple[int, ...] | None) -> tuple[Path, Entry, torch.dtype]:
        entry = self.entry(name)
        file = self._files[name]
        if shape is not None and entry.shape != shape:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {list(entry.shape)} where config.json asks for {list(shape)}; "
                "use the config.json that was saved with these weights"
            )
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{file}: tensor {name} has dtype {entry.dtype}, which is not read; save it in fp32, bf16 or fp16"
            )
        if entry.end - entry.begin != prod(entry.shape) * dtype.itemsize:
            raise CheckpointError(f"{file}: tensor {name} has the wrong number of bytes; download the file again")
        return file, entry, dtype

    def _read(self, stream: BinaryIO, into: torch.Tensor, name: str) -> None:
        buffer: Any = into.numpy()
        if stream.readinto(buffer) != len(into):  # type: ignore[attr-defined]
            raise CheckpointError(f"{stream.name}: ends within tensor {name}; download the file again")
        self.read += len(into)
