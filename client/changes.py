"""The changing side of `search:<index>`: entries added and deleted, in each shard its own. Knows no transport."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgpack
import numpy as np

from ..schema.errors import Refused, WorkerFailed
from .fanout import Ask, Layout
from .results import Array

MAX_BYTES: Final = 64 << 20  # vectors of one request
MAX_FIELDS: Final = 256 << 10  # bytes of fields of one request, whose body holds 1 MiB
MAX_ROWS: Final = 16_384
MAX_MAPS: Final = 4096  # of fields in one request
LAST_ID: Final = (1 << 63) - 1


async def add(
    ask: Ask,
    index: str,
    layout: Layout,
    vectors: Any,
    ids: Any,
    fields: Sequence[dict[str, Any]] | None,
    upsert: bool,
    end: float,
) -> Array:
    """Adds vectors and returns their ids; see Client.add."""
    if vectors is None and fields is None:
        raise Refused("nothing to add: give vectors, or to an index of texts fields that hold a text each")
    given = None if vectors is None else np.atleast_2d(np.asarray(vectors, np.float32))
    count = len(given) if given is not None else len(fields or ())
    own = None if ids is None else _ids(ids)
    if own is not None and own.shape != (count,):
        raise Refused(f"ids have shape {list(own.shape)} for {count} entries; give one for each")
    if fields is not None and len(fields) != count:
        raise Refused(f"{len(fields)} fields for {count} vectors; give a map for each")
    shards = layout.shards
    place = (np.arange(count) if own is None else own) % shards
    found = np.full(count, -1, np.int64)
    most = min(MAX_ROWS, MAX_BYTES // (4 * given.shape[1]) or 1) if given is not None and given.size else MAX_ROWS

    async def one(shard: int, rows: Array) -> None:
        for some in _parts(fields, rows, most):
            body: dict[str, Any] = {"add": True, "upsert": upsert}
            if fields is not None:
                body["fields"] = [fields[row] for row in some]
            tensors = [array[some] for array in (given, own) if array is not None]
            reply = await ask(layout.service(index, shard), body, tensors, end)
            if len(reply.tensors) != 1 or reply.tensors[0].shape != (len(some),):
                raise WorkerFailed("the index answered without the ids of what was added: is it another program?")
            found[some] = reply.tensors[0].numpy()

    await _each(one(shard, rows) for shard in range(shards) if len(rows := np.flatnonzero(place == shard)))
    return found


async def delete(ask: Ask, index: str, layout: Layout, ids: Any, end: float) -> int:
    """Deletes ids and returns how many of them there were."""
    given = np.unique(_ids(ids))
    shards = layout.shards
    counts = [0] * shards

    async def one(shard: int, own: Array) -> None:
        reply = await ask(layout.service(index, shard), {"delete": True}, [own], end)
        counts[shard] = int(reply.body.get("deleted", 0))

    await _each(one(shard, own) for shard in range(shards) if len(own := given[given % shards == shard]))
    return sum(counts)


async def on_each(ask: Ask, index: str, layout: Layout, body: dict[str, Any], end: float) -> list[str]:
    """The versions that the shards answer with, in their order: of a snapshot, or of another index in their place."""
    replies = [ask(layout.service(index, shard), body, (), end) for shard in range(layout.shards)]
    return [str(reply.body.get("version", "")) for reply in await asyncio.gather(*replies)]


def _ids(given: Any) -> Array:
    """int64 [n]; an empty list has no dtype of its own. Raises Refused."""
    ids = np.atleast_1d(np.asarray(given))
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.max() > LAST_ID)):
        raise Refused(f"ids are {ids.dtype} {list(ids.shape)}; give whole numbers [n], from 0 on")
    return ids.astype(np.int64)


def _parts(fields: Sequence[dict[str, Any]] | None, rows: Array, most: int) -> Iterator[Array]:
    """Rows of one shard, as many at a time as one message holds."""
    if fields is None:
        yield from (rows[start : start + most] for start in range(0, len(rows), most))
        return
    most = min(most, MAX_MAPS)
    start, size = 0, 0
    for place, row in enumerate(rows.tolist()):
        try:
            width = len(msgpack.packb(fields[row]))
        except (TypeError, ValueError, OverflowError):
            raise Refused(f"the fields of entry {row} cannot travel; give texts, numbers, lists and maps") from None
        if place > start and (size + width > MAX_FIELDS or place - start >= most):
            yield rows[start:place]
            start, size = place, 0
        size += width
    yield rows[start:]


async def _each(tasks: Any) -> None:
    """All of them, though one fails: a change that was begun on a shard is waited for."""
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
