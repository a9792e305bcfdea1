"""What an index answers to requests that change it, and which index a path holds. Knows requests, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..base import Answer, Request
from ..index.query import BadQuery, Source
from ..index.store import OpenIndex, open_index
from .changes import BadChange
from .live import LiveIndex
from .opening import is_live, open_live
from .snapshot import place

OPEN: Final = "open"
_KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "add": ("fields", "upsert"),
    "delete": (),
    "snapshot": (),
    OPEN: (),
}


def is_change(body: Mapping[str, Any]) -> bool:
    """Whether a request changes the index, or puts another in its place."""
    return any(kind in body for kind in _KINDS)


def open_source(path: Path, *, live: bool, mmap: bool, threads: int) -> OpenIndex | LiveIndex:
    """The index in a directory; a built one may be changed where `live` is set. Raises ManifestError."""
    if live or is_live(path):
        return open_live(path, threads=threads)
    return open_index(path, mmap=mmap)


def close_source(index: Source) -> None:
    """Ends a live index, so that another process may open its directory; nothing for others."""
    if isinstance(index, LiveIndex):
        index.close()


def other_path(body: Mapping[str, Any]) -> Path:
    """Of a request {"open": path} the directory that it names. Raises BadQuery."""
    path = body[OPEN]
    if len(body) != 1 or not isinstance(path, str) or not path or "\0" in path:
        raise BadQuery('send {"open": directory} alone to put another version in place')
    return Path(path).expanduser()


async def changed(index: Source, request: Request, *, whole: bool) -> Answer:
    """The answer to a change of a live index.

    - {"add": true, "fields": [map, ...], "upsert": false} with vectors float32 [n, d] and perhaps ids int64 [n], all or
      none of them: {"version"} and their ids int64 [n].
    - {"delete": true} with ids int64 [n]: {"deleted": how many of them there were, "version"}.
    - {"snapshot": true}: {"version"} of the snapshot and the {"directory"} where its server finds it.

    An answer means: it is on the disk, and every later search sees it. A request that comes again, by its id, is not
    done twice.

    Args:
        whole: it was sent to `search:<name>`, of which this may be one shard.

    Raises BadChange, BadQuery, WorkerFailed.
    """
    body = request.body
    kind = next(kind for kind in _KINDS if kind in body)
    unknown = sorted(str(key) for key in body if key != kind and key not in _KINDS[kind])
    if unknown:
        raise BadQuery(f"unknown field {unknown[0]}; {kind} knows {', '.join(_KINDS[kind]) or 'no other'}")
    if body[kind] is not True:
        raise BadQuery(f"{kind} is {body[kind]!r}; send true")
    if not isinstance(index, LiveIndex):
        name = index.view().info()["name"]
        raise BadChange(f"the index {name} takes no changes; serve it with -o live=true, or make a live one")
    room = index.room
    if whole and room.shards > 1:
        raise BadChange(f"this index has shards: ask search:{room.name}/0 to search:{room.name}/{room.shards - 1}")
    version = {"version": index.log.settings.version}
    arrays = [tensor.numpy() for tensor in request.tensors]
    if kind == "snapshot":
        made = await asyncio.shield(asyncio.to_thread(index.snapshot))
        return {"version": made, "directory": str(place(index.log.path.parent, made))}
    if kind == "delete":
        if len(arrays) != 1:
            raise BadChange(f"{len(arrays)} arrays came; send one, the ids int64 [n]")
        change = index.submit(room.delete(arrays[0], request=request.id))
        deleted = await asyncio.wrap_future(change.done)
        return {"deleted": int(deleted[0])} | version
    if not 1 <= len(arrays) <= 2:
        raise BadChange(f"{len(arrays)} arrays came; send vectors float32 [n, {room.dimension}], perhaps ids int64 [n]")
    ids = arrays[1] if len(arrays) == 2 else None
    checked = room.add(arrays[0], ids, body.get("fields"), upsert=body.get("upsert", False), request=request.id)
    return version, [await asyncio.wrap_future(index.submit(checked).done)]
