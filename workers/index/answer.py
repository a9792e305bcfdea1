"""What an index answers to one request: fields and arrays in, fields and arrays out. Knows no worker and no socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .store import BadQuery, OpenIndex
from .stream import PAD

MAX_PASSAGES = 1024
CONTEXT = 16
_FIELDS = {"k", "nprobe", "following", "passages", "info"}

Reply = tuple[dict[str, Any], list[NDArray[Any]]]


def answer(index: OpenIndex, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Reply:
    """The answer to one request of the service `search:<name>`.

    Body {"info": true} without arrays gives {"name", "d", "ntotal", "metric", "fingerprint", "model",
    "tokens_per_payload"}. Else the body is {"k": 10, "nprobe": 8, "following": true, "passages": false} (all optional,
    these are the defaults) with queries float32 [m, d]. The arrays of the answer, in this order: ids int64 [m, k],
    distances float32 [m, k], with `following` payloads int32 [m, k, 8], and with `passages` (at most 1024 hits) windows
    int32 [m, k, 32] of tokens (-1 behind their end), splits int32 [m, k] (how many tokens of a window are its entry's
    context), documents int32 [m, k] (places in the body's list "documents", -1 = none) and starts int64 [m, k] (the
    offset of the window in its document). Raises BadQuery.
    """
    unknown = sorted(str(key) for key in body if key not in _FIELDS)
    if unknown:
        raise BadQuery(f"unknown field {unknown[0]}; an index knows {', '.join(sorted(_FIELDS))}")
    flags = {name: body.get(name, default) for name, default in (("info", 0), ("following", 1), ("passages", 0))}
    wrong = [name for name, value in flags.items() if value not in (True, False)]
    if wrong:
        raise BadQuery(f"{wrong[0]} is {flags[wrong[0]]!r}; send true or false")
    if flags["info"]:
        return _info(index), []
    if len(arrays) != 1:
        raise BadQuery(f"{len(arrays)} arrays came; send one, the queries float32 [m, {index.manifest.dimension}]")
    ids, distances = index.search(arrays[0], body.get("k", 10), body.get("nprobe"))
    found: list[NDArray[Any]] = [ids, distances]
    if flags["following"]:
        found.append(index.following(ids))
    if not flags["passages"]:
        return {}, found
    names, windows = _passages(index, ids)
    return {"documents": names}, [*found, *windows]


def _info(index: OpenIndex) -> dict[str, Any]:
    manifest = index.manifest
    return {
        "name": manifest.name,
        "d": manifest.dimension,
        "ntotal": manifest.ntotal,
        "metric": manifest.metric,
        "fingerprint": manifest.fingerprint,
        "model": manifest.model,
        "tokens_per_payload": manifest.tokens_per_payload,
    }


def _passages(index: OpenIndex, ids: NDArray[np.int64]) -> tuple[list[str], list[NDArray[Any]]]:
    if ids.size > MAX_PASSAGES:
        raise BadQuery(f"passages of {ids.size} hits; ask for at most {MAX_PASSAGES} at once")
    windows = np.full((ids.size, 2 * CONTEXT), PAD, np.int32)
    splits, documents = np.zeros(ids.size, np.int32), np.full(ids.size, -1, np.int32)
    starts = np.zeros(ids.size, np.int64)
    places: dict[str, int] = {}
    for row, passage in enumerate(index.passages(ids.ravel(), CONTEXT, CONTEXT)):
        if passage is not None:
            windows[row, : len(passage.tokens)] = passage.tokens
            splits[row], starts[row] = passage.split, passage.start
            documents[row] = places.setdefault(passage.document, len(places))
    columns: list[NDArray[Any]] = [splits, documents, starts]
    return list(places), [windows.reshape(*ids.shape, -1), *(column.reshape(ids.shape) for column in columns)]
