"""What the members of a group compute, over straight connections. Knows elements and ranks, no socket.

Each member reduces a part of a large array, in the order of the ranks, and then gives it to the others: what travels is
that of a ring, 2 (size - 1) / size of the array for each member, in two steps in place of 2 (size - 1), and the order
of the summands is the same for each element, which a ring cannot have. Small arrays go to rank 0 and back.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from .arrays import Elements, Reduction, as_given, elements_of, reduced, result_dtype
from .mesh import Mesh

SMALL: Final = 1 << 20  # bytes of an array up to which rank 0 alone reduces it: see docs/collectives.md
GIVE, BACK = 0, 1  # steps of a call


def bounds(count: int, size: int, rank: int) -> tuple[int, int]:
    """Which of so many elements a member reduces."""
    return count * rank // size, count * (rank + 1) // size


class Calls:
    """The collectives over a mesh; `number` is that of the call, as begun there."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def barrier(self, number: int) -> None:
        """Each hears, in rounds, of twice as many that have come."""
        mesh, distance, step = self._mesh, 1, 0
        while distance < mesh.size:
            mesh.send(number, step, (mesh.rank + distance) % mesh.size)
            await mesh.take(number, step, (mesh.rank - distance) % mesh.size)
            distance, step = 2 * distance, step + 1

    async def broadcast(self, number: int, own: Elements | None, root: int) -> Elements:
        mesh = self._mesh
        if mesh.rank != root:
            return await mesh.take(number, GIVE, root)
        assert own is not None
        for rank in mesh.others:
            mesh.send(number, GIVE, rank, own)
        return own

    async def scatter(self, number: int, parts: Sequence[Elements], root: int) -> Elements:
        mesh = self._mesh
        if mesh.rank != root:
            return await mesh.take(number, GIVE, root)
        for rank in mesh.others:
            mesh.send(number, GIVE, rank, parts[rank])
        return parts[root]

    async def gather(self, number: int, own: Elements, root: int, step: int = GIVE) -> list[Elements]:
        """Of all, at the root; nothing elsewhere."""
        mesh = self._mesh
        if mesh.rank != root:
            mesh.send(number, step, root, own)
            return []
        return [own if rank == root else await mesh.take(number, step, rank) for rank in range(mesh.size)]

    async def all_gather(self, number: int, own: Elements, step: int = GIVE) -> list[Elements]:
        mesh = self._mesh
        for rank in mesh.others:
            mesh.send(number, step, rank, own)
        return [own if rank == mesh.rank else await mesh.take(number, step, rank) for rank in range(mesh.size)]

    async def reduce_scatter(self, number: int, parts: Sequence[Elements], op: str) -> Elements:
        """Of all parts for this member, in the order of the ranks."""
        mesh, own = self._mesh, parts[self._mesh.rank]
        for distance in range(1, mesh.size):  # not all to the same one first
            rank = (mesh.rank + distance) % mesh.size
            mesh.send(number, GIVE, rank, parts[rank])
        reduction = Reduction(op, own.dtype)
        for rank in range(mesh.size):
            reduction.add(own.flat if rank == mesh.rank else (await mesh.take(number, GIVE, rank)).flat)
            await asyncio.sleep(0)  # others of this event loop get their turn
        return Elements(result_dtype(op, own.dtype), own.shape, reduction.result(), own.torch)

    async def reduce(self, number: int, own: Elements, op: str, root: int) -> Elements | None:
        """Of all, at the root."""
        if own.nbytes <= SMALL:
            parts = await self.gather(number, own, root)
            return _reduced(op, parts) if parts else None
        part = await self.reduce_scatter(number, self._parts(own), op)
        parts = await self.gather(number, part, root, BACK)
        return _joined(parts, own.shape) if parts else None

    async def all_reduce(self, number: int, own: Elements, op: str) -> Elements:
        mesh = self._mesh
        if own.nbytes > SMALL:
            part = await self.reduce_scatter(number, self._parts(own), op)
            return _joined(await self.all_gather(number, part, BACK), own.shape)
        parts = await self.gather(number, own, 0)
        if not parts:
            return await mesh.take(number, BACK, 0)
        made = _reduced(op, parts)
        for rank in mesh.others:
            mesh.send(number, BACK, rank, made)
        return made

    def _parts(self, own: Elements) -> list[Elements]:
        size = self._mesh.size
        return [own.cut(*bounds(len(own.flat), size, rank)) for rank in range(size)]


def _reduced(op: str, parts: Sequence[Elements]) -> Elements:
    """Of whole arrays, in the order of the ranks."""
    first = parts[0]
    flat = reduced(op, first.dtype, [part.flat for part in parts])
    return Elements(result_dtype(op, first.dtype), first.shape, flat, first.torch)


def _joined(parts: Sequence[Elements], shape: tuple[int, ...]) -> Elements:
    return Elements(parts[0].dtype, shape, np.concatenate([part.flat for part in parts]), parts[0].torch)


class Direct:
    """The same for what users give and get: arrays and tensors. What a member gets is of the kind that it gave."""

    def __init__(self, mesh: Mesh) -> None:
        self._calls = Calls(mesh)
        self.barrier = self._calls.barrier

    async def broadcast(self, number: int, x: Any, root: int) -> Any:
        own = elements_of(x) if x is not None else None
        return as_given(await self._calls.broadcast(number, own, root), x)

    async def scatter(self, number: int, parts: Sequence[Any], root: int) -> Any:
        own = [elements_of(part) for part in parts]
        return as_given(await self._calls.scatter(number, own, root), parts[root] if parts else None)

    async def gather(self, number: int, x: Any, root: int) -> list[Any]:
        return [as_given(each, x) for each in await self._calls.gather(number, elements_of(x), root)]

    async def all_gather(self, number: int, x: Any) -> list[Any]:
        return [as_given(each, x) for each in await self._calls.all_gather(number, elements_of(x))]

    async def reduce(self, number: int, x: Any, op: str, root: int) -> Any:
        made = await self._calls.reduce(number, elements_of(x), op, root)
        return None if made is None else as_given(made, x)

    async def all_reduce(self, number: int, x: Any, op: str) -> Any:
        return as_given(await self._calls.all_reduce(number, elements_of(x), op), x)

    async def reduce_scatter(self, number: int, parts: Sequence[Any], op: str) -> Any:
        own = [elements_of(part) for part in parts]
        return as_given(await self._calls.reduce_scatter(number, own, op), parts[0])

    def check(self, dtype: str) -> None:
        """All that travel are reduced."""

    async def close(self) -> None:
        """Nothing of its own."""
