"""Many or large tensors in messages that hold few and small ones: pieces of bytes, each message with their hash."""

import hashlib
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Final

import torch

from ..schema.errors import Malformed
from ..schema.tensor import Tensor
from .values import DTYPES

CHUNK: Final = 32 << 20  # bytes of a message
PIECES: Final = 48  # tensors of a message
Piece = tuple[int, int, int]  # which tensor, from which byte on, how many


def specs(tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
    """Dtypes and shapes, as they travel."""
    return [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]


def pieces(sizes: Sequence[int]) -> Iterator[list[Piece]]:
    """What goes into each message: all bytes of tensors of these sizes, in order."""
    found: list[Piece] = []
    room = CHUNK
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            count = min(room, size - start)
            found.append((index, start, count))
            start, room = start + count, room - count
            if not room or len(found) == PIECES:
                yield found
                found, room = [], CHUNK
    if found:
        yield found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, [n] uint8, in its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def sizes(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def sizes_of(described: Sequence[Sequence[Any]]) -> list[int]:
    """The bytes of tensors that are described as `specs` does."""
    return [prod(shape) * DTYPES[dtype].itemsize for dtype, shape in described]


def cut(tensors: Sequence[torch.Tensor], wanted: Sequence[Sequence[int]]) -> tuple[str, list[torch.Tensor]]:
    """Some pieces, and their SHA-256 in hex.

    Raises:
        Malformed: a piece that is none of these tensors.
    """
    found, digest = [], hashlib.sha256()
    for index, start, count in wanted:
        if not 0 <= index < len(tensors) or start < 0 or count < 0:
            raise Malformed("a piece of a tensor that is not there")
        part = _bytes(tensors[index].detach().cpu().contiguous())[start : start + count]
        if len(part) != count:
            raise Malformed("a piece beyond the end of its tensor")
        digest.update(part.numpy().data)
        found.append(part)
    return digest.hexdigest(), found


class Staging:
    """Tensors that come in pieces.

    Raises:
        Malformed: a description that is none.
    """

    def __init__(self, described: Sequence[Any]) -> None:
        try:
            self.tensors = [torch.empty(shape, dtype=DTYPES[dtype]) for dtype, shape in described]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Malformed(f"tensors that cannot be: {error}") from None
        self._left = sum(sizes(self.tensors))

    def put(self, where: Sequence[Sequence[int]], parts: Sequence[Tensor], digest: str) -> None:
        """Takes the pieces of one message.

        Raises:
            Malformed: they are not what was hashed, or do not fit.
        """
        found = hashlib.sha256()
        for part in parts:
            found.update(part.buffer)
        if found.hexdigest() != digest or len(where) != len(parts):
            raise Malformed("pieces of tensors came damaged: their hash is another")
        for (index, start, count), part in zip(where, parts, strict=True):
            if not 0 <= index < len(self.tensors) or start < 0 or part.nbytes != count:
                raise Malformed("a piece of a tensor that is not there")
            into = _bytes(self.tensors[index])[start : start + count]
            if len(into) != count:
                raise Malformed("a piece beyond the end of its tensor")
            into.numpy()[:] = part.numpy()
            self._left -= count

    def complete(self) -> list[torch.Tensor]:
        """The tensors. Raises Malformed while any piece is missing."""
        if self._left:
            raise Malformed(f"{self._left} bytes of tensors are missing")
        return self.tensors
