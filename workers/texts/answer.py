"""What a text index answers to one request: fields and arrays in, fields and arrays out. Knows no worker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..index.query import BadQuery, Params
from .index import LAST_ID, GivenUp, Row, TextIndex, row_of

MAX_TEXTS: Final = 1024  # queries of one request
MAX_PASSAGES: Final = 4096  # of one change
MAX_PASSAGE: Final = 32 << 10  # bytes of a passage with its fields
MAX_PAYLOADS: Final = 900_000  # bytes of them in one reply, whose body holds 1 MiB
MAX_FOUND: Final = 8192  # hits with payloads
_SEARCH: Final = ("text", "k", "filter", "payloads", "following", "version", "nprobe", "ef", "exact")
_CHANGES: Final = ("add", "fields", "upsert", "delete", "snapshot")

Reply = tuple[dict[str, Any], list[NDArray[Any]]]


def answer_text(
    index: TextIndex,
    body: Mapping[str, Any],
    arrays: Sequence[NDArray[Any]],
    given_up: GivenUp = lambda: False,
    request: bytes = b"",
) -> Reply:
    """The answer to one request of the service `search:<name>` of a text index.

    - {"info": true}: what the index is.
    - {"text": [queries], "k": 10, "filter", "payloads": false, "version"}: ids int64 [m, k] and BM25 scores float32
      [m, k], higher is nearer; with `payloads` for each query a map for each hit, {"document", "start", "text", ...},
      {} for id -1.
      What indexes of vectors are asked besides (nprobe, ef, exact) is checked and changes nothing: every passage with
      one of the words is ranked, always.
    - {"add": true, "fields": [{"text": ..., ...}, ...], "upsert": false}, with ids int64 [n] or without: the ids.
    - {"delete": true} with ids int64 [n]: {"deleted": how many were there}.
    - {"snapshot": true}: {"version": name of the directory within `snapshots`, "directory": where its server finds it}.

    Args:
        given_up: whether nobody waits for the answer any more; asked before each query.
        request: its id; a change that comes again is not made twice.

    Raises BadQuery, BadFilter.
    """
    unknown = sorted(str(key) for key in body if key not in (*_SEARCH, *_CHANGES, "info"))
    if "open" in unknown:
        raise BadQuery("an index of texts is not exchanged while it is served; stop its server and serve the other one")
    if unknown:
        raise BadQuery(f"unknown field {unknown[0]}; an index of texts knows info, {', '.join((*_SEARCH, *_CHANGES))}")
    for name in ("info", "payloads", "following", "add", "upsert", "delete", "snapshot"):
        if body.get(name, False) not in (True, False):
            raise BadQuery(f"{name} is {body[name]!r}; send true or false")
    if body.get("info"):
        return _info(index), []
    if body.get("snapshot"):
        version = index.snapshot()
        return {"version": version, "directory": str(index.place(version))}, []
    if body.get("add"):
        return _added(index, body, arrays, request)
    if body.get("delete"):
        if len(arrays) != 1:
            raise BadQuery(f"{len(arrays)} arrays came; send one, the ids int64 [n] to delete")
        return {"deleted": index.delete(_ids(arrays[0]), request)}, []
    return _searched(index, body, arrays, given_up)


def _info(index: TextIndex) -> dict[str, Any]:
    return {
        "name": index.manifest.name,
        "kind": "text",
        "d": 0,
        "metric": "ip",
        "factory": "fts5",
        "nlist": 0,
        "model": "",
        "encoder": "",
        "tokens_per_payload": 0,
        "shards": 1,
        "shard": 0,
        "by": "rows",
        "live": True,
        **index.info(),
    }


def _searched(index: TextIndex, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]], given_up: GivenUp) -> Reply:
    texts = body.get("text")
    if arrays or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not texts:
        raise BadQuery("an index of texts is asked with text, a list of queries, and no arrays")
    if len(texts) > MAX_TEXTS:
        raise BadQuery(f"{len(texts)} queries are too many; send at most {MAX_TEXTS} at once")
    if body.get("following"):
        raise BadQuery("an index of texts knows no following tokens; leave following out")
    params = Params.of(body)
    shown = bool(body.get("payloads"))
    if shown and len(texts) * params.k > MAX_FOUND:
        raise BadQuery(f"payloads of {len(texts) * params.k} hits; ask for at most {MAX_FOUND}, or without payloads")
    found, rows, version = index.search(texts, params, shown, given_up)
    wanted = body.get("version")
    if wanted is not None and wanted != version:
        raise BadQuery(f"the index is version {version}, not {str(wanted)[:64]!r}; ask for its info again")
    if not shown:
        return {"version": version}, [*found]
    size = sum(len(row.text.encode()) + len(row.fields.encode()) for line in rows for row in line if row is not None)
    if size > MAX_PAYLOADS:
        raise BadQuery(f"the payloads have {size} bytes, a reply holds {MAX_PAYLOADS}; ask for fewer, or without them")
    return {"version": version, "payloads": [[_payload(row) for row in line] for line in rows]}, [*found]


def _payload(row: Row | None) -> dict[str, Any]:
    return {} if row is None else {**json.loads(row.fields), "text": row.text}


def _added(index: TextIndex, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]], request: bytes) -> Reply:
    fields = body.get("fields")
    if not isinstance(fields, list) or not fields or not all(isinstance(entry, dict) for entry in fields):
        raise BadQuery("fields: send a list of maps, each with a text")
    if len(fields) > MAX_PASSAGES:
        raise BadQuery(f"fields: {len(fields)} passages are too many; send at most {MAX_PASSAGES} at once")
    if len(arrays) > 1:
        raise BadQuery(f"{len(arrays)} arrays came; send the ids int64 [n] of the passages, or none")
    ids = _ids(arrays[0]) if arrays else None
    if ids is not None and (len(ids) != len(fields) or len(set(ids)) != len(ids)):
        raise BadQuery(f"{len(ids)} ids came for {len(fields)} passages; send one for each, all different")
    rows = [row_of(entry, MAX_PASSAGE) for entry in fields]
    return {}, [np.array(index.add(rows, ids, bool(body.get("upsert")), request), np.int64)]


def _ids(array: NDArray[Any]) -> list[int]:
    if array.dtype != np.int64 or array.ndim != 1:
        raise BadQuery(f"ids are {array.dtype} {list(array.shape)}; send int64 [n]")
    if array.size and (array.min() < 0 or array.max() > LAST_ID):
        raise BadQuery(f"ids must be 0 to {LAST_ID}")
    found: list[int] = array.tolist()
    return found
