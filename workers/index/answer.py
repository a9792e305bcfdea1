"""What an index answers to one request: fields and arrays in, fields and arrays out. Knows no worker and no socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .store import BadQuery, OpenIndex, Passage

CONTEXT = 16
NAME_BYTES = 128
TEXT_BYTES = 256
MAX_PAYLOADS = 1024  # hits whose payloads travel in one body of 1 MiB: name, texts, 32 token ids, keys are below 1 KiB
_FIELDS = ("k", "nprobe", "following", "payloads", "info")

Reply = tuple[dict[str, Any], list[NDArray[Any]]]


def answer(index: OpenIndex, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Reply:
    """The answer to one request of the service `search:<name>`.

    Body {"info": true} without arrays gives {"name", "d", "ntotal", "metric", "fingerprint", "model",
    "tokens_per_payload"}. Else the body is {"k": 10, "nprobe": 8, "following": true, "payloads": false} (all optional,
    these are the defaults) with queries float32 [m, d]. The arrays of the answer are ids int64 [m, k], distances
    float32 [m, k] and, with `following`, the tokens behind each hit int32 [m, k, 8]. With `payloads` (at most 1024
    hits) its body holds "payloads": for each query a map for each hit, {"document": name (its last 128 bytes), "start":
    offset of the window in it, "split": how many tokens of the window are the hit's context, "tokens": window}, {} for
    id -1. An index with a tokenizer adds both parts of the window as text, "context" (its last 256 bytes) and
    "continuation" (its first 256 bytes).

    Raises BadQuery.
    """
    unknown = sorted(str(key) for key in body if key not in _FIELDS)
    if unknown:
        raise BadQuery(f"unknown field {unknown[0]}; an index knows {', '.join(_FIELDS)}")
    flags = {name: body.get(name, default) for name, default in (("info", 0), ("following", 1), ("payloads", 0))}
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
    return ({"payloads": _payloads(index, ids)} if flags["payloads"] else {}), found


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


def _payloads(index: OpenIndex, ids: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
    if ids.size > MAX_PAYLOADS:
        raise BadQuery(f"payloads of {ids.size} hits; ask for at most {MAX_PAYLOADS} at once, or without payloads")
    return [[_map(passage, index.tokenizer) for passage in index.passages(row, CONTEXT, CONTEXT)] for row in ids]


def _map(passage: Passage | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if passage is None:
        return {}
    tokens = passage.tokens.tolist()
    found = {
        "document": _cut(passage.document, slice(-NAME_BYTES, None)),
        "start": passage.start,
        "split": passage.split,
        "tokens": tokens,
    }
    if tokenizer is not None:
        context, continuation = _texts(tokens, passage.split, tokenizer)
        found["context"] = _cut(context, slice(-TEXT_BYTES, None))
        found["continuation"] = _cut(continuation, slice(TEXT_BYTES))
    return found


def _texts(tokens: list[int], split: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """Both parts; joined they are the window's text, unless the split falls inside a character.

    Decoded alone, the second part of many tokenizers would lose the space it begins with.
    """
    context, whole = tokenizer.decode(tokens[:split]), tokenizer.decode(tokens)
    if whole.startswith(context):
        return context, whole[len(context) :]
    return context, tokenizer.decode(tokens[split:])


def _cut(text: str, kept: slice) -> str:
    """Those bytes of the text as UTF-8, without a character that the cut splits."""
    return text.encode(errors="replace")[kept].decode(errors="ignore")
