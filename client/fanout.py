"""The shards of an index, asked as one: who is asked what, and the exact merge. Knows the fields, no transport."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..schema.errors import Busy, DeadlineExceeded, NoService, Refused, WorkerFailed, WorkerLost
from ..schema.tensor import tensor_of
from .results import Array, Reply

Ask = Callable[[str, dict[str, Any], Sequence[Any], float], Awaitable[Reply]]
MISSING: Final = (Busy, DeadlineExceeded, NoService, WorkerFailed, WorkerLost)  # what a partial answer does without
MARGIN: Final = 0.1  # of the time that is left: a partial answer needs it to come by its deadline
AT_MOST: Final = 0.005  # seconds of it
AGAIN: Final = 3  # times that a search begins anew because another version is there
PAUSE: Final = 0.02  # seconds between two looks at shards of different versions
SOON: Final = 1.0  # seconds in which a shard is to say its version; who does not is not waited for


@dataclass(frozen=True, slots=True)
class Layout:
    """How an index is spread.

    Attributes:
        shards: 1 for an index that is whole.
        owners: the shard of each list, int32 [lists], where lists were spread; None where rows were.
        info: what the index says of itself.
    """

    shards: int
    owners: Array | None
    info: dict[str, Any]

    def service(self, index: str, shard: int) -> str:
        """Where a shard is asked, or the whole of an index that has none."""
        return f"search:{index}" if self.shards == 1 else f"search:{index}/{shard}"

    def same(self, other: "Layout") -> bool:
        """Whether a request that was refused under one of them would be under the other."""
        return all(self.info.get(key) == other.info.get(key) for key in ("shards", "by", "version"))


@dataclass(slots=True)
class Part:
    """What one shard is asked: rows of the queries (None for all) with their tensors; and its reply, None for none."""

    service: str
    tensors: list[Any]
    rows: Array | None = None
    reply: Reply | None = None


class Fanout:
    """Searches an index, whole or in shards, with the same body and the same reply.

    The layout is asked for once, and again when the index refuses: another version may have taken its place. While
    shards have different versions, since one takes the other's place shard by shard, a search waits.

    Args:
        ask: one request: service, body, tensors, loop time by which it must have ended.
        known: layouts from before; grows.
    """

    def __init__(self, ask: Ask, known: dict[str, Layout] | None = None) -> None:
        self.ask = ask
        self._known = {} if known is None else known

    async def layout(self, index: str, end: float, partial: bool = False) -> Layout:
        """How the index is spread.

        Args:
            partial: where one server is late, another one is asked.

        Raises:
            NoService: nobody serves it.
            WorkerFailed: what serves its name is no index.
        """
        known = self._known.get(index)
        if known is None:
            known = self._known[index] = await self._asked(index, end, partial)
        return known

    async def search(
        self, index: str, body: dict[str, Any], tensors: Sequence[Any], end: float, *, partial: bool = False
    ) -> Reply:
        """The reply of the whole index, its body with `shards`: how many of them it holds, of how many.

        Args:
            end: loop time by which it must have ended.
            partial: do without shards that are lost or late, unless all are; else the first of them is an error.

        Raises:
            RalmqError: as the index answers.
        """
        known = index in self._known
        layout = await self.layout(index, end, partial)
        for _ in range(AGAIN):
            try:
                return await self._searched(index, layout, body, tensors, end, partial)
            except (NoService, Refused):
                self._known.pop(index, None)
                if not known and layout.shards == 1:
                    raise
                again = await self._agreed(index, end, partial)
                if again.same(layout):
                    raise
                layout = again
        return await self._searched(index, layout, body, tensors, end, partial)

    async def _agreed(self, index: str, end: float, partial: bool) -> Layout:
        """How the index is spread by now, once all shards that answer have its version."""
        loop = asyncio.get_running_loop()
        while True:
            layout = await self.layout(index, end, partial)
            if layout.shards == 1:
                return layout
            soon = min(end, loop.time() + SOON)
            asked = [self.ask(layout.service(index, shard), {"info": True}, (), soon) for shard in range(layout.shards)]
            replies = await asyncio.gather(*asked, return_exceptions=True)
            others = {reply.body.get("version") for reply in replies if isinstance(reply, Reply)}
            if others <= {layout.info.get("version")}:
                return layout
            self._known.pop(index, None)
            if loop.time() + PAUSE >= end:
                raise DeadlineExceeded(
                    f"the shards of {index} have different versions: put one in the place of all with `ralmq index use`"
                )
            await asyncio.sleep(PAUSE)

    async def _asked(self, index: str, end: float, partial: bool) -> Layout:
        info = (await self._any(index, {"info": True}, (), end, partial)).body
        shards = info.get("shards", 1)
        if type(shards) is not int or shards < 1:
            raise WorkerFailed(f"search:{index} does not say how many shards it has: is another program serving it?")
        owners = None
        if shards > 1 and info.get("by") == "list":
            reply = await self._any(index, {"owners": True}, (), end, partial)
            owners = reply.tensors[0].numpy()
        return Layout(shards, owners, info)

    async def _searched(
        self, index: str, layout: Layout, body: dict[str, Any], tensors: Sequence[Any], end: float, partial: bool
    ) -> Reply:
        if layout.shards == 1 or "ngram" in body:  # each shard has the whole text
            reply = await self.ask(f"search:{index}", body, tensors, end)
            return Reply({**reply.body, "shards": [1, 1]}, reply.tensors)
        if layout.info.get("version"):
            body = {**body, "version": layout.info["version"]}
        widened = "filter" in body and "nprobe" not in body  # shards look into more lists than `assign` names
        if layout.owners is not None and not body.get("exact") and not widened:
            if not body.get("lists"):
                probed = {"assign": True} | {name: body[name] for name in ("nprobe", "version") if name in body}
                assigned = await self._any(index, probed, tensors, end, partial)
                tensors = [tensors[0], *(tensor.numpy() for tensor in assigned.tensors)]
                body = {**body, "lists": True}
            parts = owned(layout, index, *map(_array, tensors))
        else:
            parts = [Part(layout.service(index, shard), list(tensors)) for shard in range(layout.shards)]
        lost = await self._all(index, parts, body, end, partial)
        rows = len(_array(tensors[0])) if tensors else len(body.get("text", ()))
        merged = merge(parts, rows, int(body.get("k", 10)), nearest_first=layout.info.get("metric", "l2") == "l2")
        return Reply({**merged.body, "shards": [layout.shards - lost, layout.shards]}, merged.tensors)

    async def _any(self, index: str, body: dict[str, Any], tensors: Sequence[Any], end: float, partial: bool) -> Reply:
        """What any shard can answer; where one may be late, another is asked within the time that is left."""
        if partial:
            now = asyncio.get_running_loop().time()
            with contextlib.suppress(*MISSING):
                return await self.ask(f"search:{index}", body, tensors, now + (end - now) / 3)
        return await self.ask(f"search:{index}", body, tensors, end)

    async def _all(self, index: str, parts: list[Part], body: dict[str, Any], end: float, partial: bool) -> int:
        """Asks every part; how many gave no answer."""
        if not parts:
            return 0
        left = end - asyncio.get_running_loop().time()
        wait = left - min(AT_MOST, MARGIN * left) if partial else None
        tasks = [asyncio.ensure_future(self.ask(part.service, body, part.tensors, end)) for part in parts]
        try:
            how = asyncio.ALL_COMPLETED if partial else asyncio.FIRST_EXCEPTION
            await asyncio.wait(tasks, timeout=wait, return_when=how)
        finally:
            late = [task for task in tasks if not task.done()]
            for task in late:
                task.cancel()
        errors = [error for task in tasks if task not in late and (error := task.exception()) is not None]
        for error in errors:
            if not (partial and isinstance(error, MISSING)):
                raise error
        for part, task in zip(parts, tasks, strict=True):
            if task not in late and task.exception() is None:
                part.reply = task.result()
        lost = sum(part.reply is None for part in parts)
        if lost == len(parts):
            raise errors[0] if errors else DeadlineExceeded(f"none of the shards of {index} answered in time")
        return lost


def owned(layout: Layout, index: str, queries: Array, lists: Array, coarse: Array) -> list[Part]:
    """What each shard is asked where lists were spread: the rows that probe a list of its own, others' lists as -1.

    Raises:
        Refused: they are no lists of this index.
    """
    assert layout.owners is not None
    if lists.dtype != np.int64 or lists.ndim != 2 or len(lists) != len(queries) or coarse.shape != lists.shape:
        said = f"list ids are {lists.dtype} {list(lists.shape)}, coarse distances {list(coarse.shape)}"
        raise Refused(f"{said}; send int64 and float32 [{len(queries)}, nprobe]")
    if lists.size and (lists.min() < -1 or lists.max() >= len(layout.owners)):
        raise Refused(f"list ids leave the index; send -1 (none) to {len(layout.owners) - 1}")
    owner = np.where(lists >= 0, layout.owners[np.maximum(lists, 0)], -1)
    parts: list[Part] = []
    for shard in range(layout.shards):
        mine = owner == shard
        rows = np.flatnonzero(mine.any(1))
        if len(rows):
            chosen = np.where(mine, lists, -1)[rows]
            parts.append(Part(layout.service(index, shard), [queries[rows], chosen, coarse[rows]], rows))
    return parts


def best(ids: Array, distances: Array, k: int, *, nearest_first: bool) -> Array:
    """The places of the k best of each row [m, n], by distance and then by id; id -1 is behind all."""
    keys = np.where(ids < 0, np.inf, distances if nearest_first else -distances)
    order: Array = np.lexsort((ids, keys), axis=1)[:, :k]
    return order


def merge(parts: Sequence[Part], rows: int, k: int, *, nearest_first: bool) -> Reply:
    """The k best of what the shards found, exactly: by distance, then by id.

    Args:
        rows: queries in all.
        nearest_first: small distances are near (l2); else large ones (ip, cosine).

    Raises:
        WorkerFailed: a reply does not fit.
    """
    answered = [(part, part.reply) for part in parts if part.reply is not None]
    found = [[tensor.numpy() for tensor in reply.tensors] for _, reply in answered]
    extra = max((len(arrays) - 2 for arrays in found), default=0)
    wanted = [len(part.rows) if part.rows is not None else rows for part, _ in answered]
    if any(
        len(arrays) != 2 + extra or any(array.shape[:2] != (count, k) for array in arrays)
        for arrays, count in zip(found, wanted, strict=True)
    ):
        raise WorkerFailed("a shard answered in another shape than it was asked for: do all have the same version?")
    far = np.inf if nearest_first else -np.inf
    wide = [_wide(arrays, part.rows, rows, far) for arrays, (part, _) in zip(found, answered, strict=True)]
    if not wide:
        wide = [[np.full((rows, k), -1, np.int64), np.full((rows, k), far, np.float32)]]
    ids, distances, *others = [np.concatenate(arrays, 1) for arrays in zip(*wide, strict=True)]
    order = best(ids, distances, k, nearest_first=nearest_first)
    arrays = [np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)]
    arrays += [np.take_along_axis(other, order.reshape(*order.shape, *[1] * (other.ndim - 2)), 1) for other in others]
    body: dict[str, Any] = {}
    if any("payloads" in reply.body for _, reply in answered):
        lines = [_lines(reply, part.rows, rows, k) for part, reply in answered]
        body["payloads"] = [
            [lines[place // k][row][place % k] for place in places] for row, places in enumerate(order.tolist())
        ]
    return Reply(body, tuple(tensor_of(np.ascontiguousarray(array)) for array in arrays))


def _wide(arrays: Sequence[Array], rows: Array | None, count: int, far: float) -> list[Array]:
    """A shard's arrays for all queries; nothing was found for those that it was not asked about."""
    if rows is None:
        return list(arrays)
    whole: list[Array] = []
    for place, array in enumerate(arrays):
        filled = np.full((count, *array.shape[1:]), far if place == 1 else -1, array.dtype)
        filled[rows] = array
        whole.append(filled)
    return whole


def _lines(reply: Reply, rows: Array | None, count: int, k: int) -> list[list[dict[str, Any]]]:
    given = reply.body.get("payloads")
    asked = range(count) if rows is None else rows.tolist()
    if not isinstance(given, list) or [len(line) for line in given] != [k] * len(asked):
        raise WorkerFailed("a shard answered without a payload for each neighbour: do all have the same version?")
    lines: list[list[dict[str, Any]]] = [[{}] * k for _ in range(count)]
    for place, line in zip(asked, given, strict=True):
        lines[place] = line
    return lines


def _array(tensor: Any) -> Array:
    return tensor.numpy() if hasattr(tensor, "numpy") else np.asarray(tensor)
