"""What an index answers to requests: fields and arrays in, fields and arrays out. Knows no worker and no socket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from numpy.typing import NDArray

from ..index.query import BadQuery, Found, Params, Searchable, check_lists, check_queries
from .batch import GivenUp, Search, Seen, search_together

MAX_PAYLOADS: Final = 1024  # hits whose payloads travel in one body of 1 MiB: a passage is below 1 KiB
_FLAGS: Final = ("info", "quantizer", "owners", "assign", "lists", "following", "payloads", "exact")
_FIELDS: Final = frozenset((*_FLAGS, "k", "nprobe", "ef", "filter", "version"))
_KNOWN: Final = "k, nprobe, ef, filter, exact, lists, following, payloads, version, assign, quantizer, owners, info"

Reply = tuple[dict[str, Any], list[NDArray[Any]]]


@dataclass(slots=True)
class Asked:
    """One request.

    Attributes:
        whole: it was sent to the service of the whole index, `search:<name>`, which a shard may be one of.
        id: the request's own, by which a change that comes again is known.
    """

    body: Mapping[str, Any]
    arrays: Sequence[NDArray[Any]]
    whole: bool = False
    id: bytes = b""


def answer(index: Searchable, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Reply:
    """The answer to one request of `search:<name>`; see `answers`. Raises BadQuery, BadFilter."""
    found = answers(index, [Asked(body, arrays)])[0]
    if isinstance(found, Exception):
        raise found
    return found


def answers(
    index: Searchable,
    asked: Sequence[Asked],
    *,
    threads: int = 1,
    effort: int | None = None,
    seen: Seen | None = None,
    given_up: GivenUp = lambda: False,
) -> list[Reply | Exception]:
    """The answers to requests that came together, each as if it were alone; an exception for one that fails.

    - {"info": true}: see Searchable.info.
    - {"quantizer": true}: {"metric", "nlist"} with centroids float32 [nlist, d] and the shard of each list int32
      [nlist]; {"owners": true}: the latter alone.
    - {"assign": true, "nprobe"} with queries: the lists int64 [m, nprobe] that a search looks into, and their coarse
      distances float32 [m, nprobe].
    - {"ngram": n} with contexts: what stands behind them in the datastore's text, see NgramTable.answer.
    - a search {"k": 10, "nprobe", "ef", "filter", "exact": false, "following", "payloads": false, "version"}, all
      optional, with queries float32 [m, d]; with "lists": true also the lists to look into and their coarse distances.
      The arrays of the answer are ids int64 [m, k], distances float32 [m, k], each row by (distance, id), and with
      `following`, the default of a datastore, the tokens behind each hit int32 [m, k, 8]. With `payloads` (at most 1024
      hits) its body holds "payloads": for each query a map for each hit, {} for id -1: the fields it was added with; of
      a datastore {"document": name (its last 128 bytes), "start": offset of the window in it, "split": how many tokens
      of the window are the hit's context, "tokens": window} and, where it has a tokenizer, both parts of the window as
      text, "context" (its last 256 bytes) and "continuation" (its first 256 bytes). "version" in the answer is that of
      the index; a request that names another one is refused.

    Args:
        effort: the nprobe or ef of requests that name none.
        given_up: whether nobody waits for any of the answers any more.
    """
    info = index.info()
    searches: list[Search] = []
    places: list[int] = []
    replies: list[Reply | Exception | None] = []
    for place, request in enumerate(asked):
        try:
            parsed = _parsed(index, info, request, effort)
        except Exception as error:  # a wrong request fails alone
            replies.append(error)
            continue
        if isinstance(parsed, Search):
            searches.append(parsed)
            places.append(place)
            replies.append(None)
        else:
            replies.append(parsed)
    results = search_together(index, searches, threads=threads, seen=seen, given_up=given_up)
    for place, found in zip(places, results, strict=True):
        replies[place] = found if isinstance(found, Exception) else _reply(index, info, asked[place].body, found)
    return [reply for reply in replies if reply is not None]


def _parsed(index: Searchable, info: Mapping[str, Any], asked: Asked, effort: int | None) -> Search | Reply:
    body, arrays = asked.body, asked.arrays
    if "ngram" in body:  # also of a shard: each has the whole text
        return index.ngrams(body, arrays)
    _check_fields(body)
    if body.get("info"):
        return dict(info), []
    if body.get("quantizer") or body.get("owners"):
        centroids, owners = index.centroids()
        said = {"metric": info["metric"], "nlist": index.nlist}
        return said, ([centroids, owners] if body.get("quantizer") else [owners])
    version = body.get("version")
    if version is not None and version != info["version"]:
        raise BadQuery(f"the index is version {info['version']}, not {str(version)[:64]!r}; ask for its info again")
    params = Params.of(body, index.nlist)
    if effort is not None and params.nprobe is None and params.ef is None:
        params = replace(params, effort=effort)
    wanted = 3 if body.get("lists") else 1
    if len(arrays) != wanted:
        names = ", list ids int64 [m, nprobe], coarse distances float32 [m, nprobe]" if wanted == 3 else ""
        raise BadQuery(f"{len(arrays)} arrays came; send {wanted}, the queries float32 [m, {index.dimension}]{names}")
    queries = check_queries(arrays[0], index.dimension, info["name"], params.k)
    if body.get("assign"):
        return {"version": info["version"]}, list(index.assign(queries, params))
    if asked.whole and info["shards"] > 1:
        name, most = info["name"], info["shards"] - 1
        raise BadQuery(f"this index has shards: ask search:{name}/0 to search:{name}/{most} and merge what they find")
    if body.get("payloads") and len(queries) * params.k > MAX_PAYLOADS:
        hits = len(queries) * params.k
        raise BadQuery(f"payloads of {hits} hits; ask for at most {MAX_PAYLOADS} at once, or without payloads")
    if body.get("following") and not info["tokens_per_payload"]:
        raise BadQuery(f"the index {info['name']} is no datastore: it has no tokens; leave following out")
    if wanted == 1:
        return Search(params, queries)
    lists, coarse = check_lists(arrays[1], arrays[2], len(queries), index.nlist)
    return Search(params, queries, lists, coarse)


def _check_fields(body: Mapping[str, Any]) -> None:
    if not body.keys() <= _FIELDS:
        unknown = sorted(str(key) for key in body if key not in _FIELDS)
        if unknown[0] == "text":
            raise BadQuery("this index is searched with vectors, not text; encode the text first (info names how)")
        raise BadQuery(f"unknown field {unknown[0]}; an index knows {_KNOWN}")
    for name in _FLAGS:
        if name in body and body[name] not in (True, False):
            raise BadQuery(f"{name} is {body[name]!r}; send true or false")


def _reply(index: Searchable, info: Mapping[str, Any], body: Mapping[str, Any], found: Found) -> Reply | Exception:
    said: dict[str, Any] = {"version": info["version"]}
    arrays: list[NDArray[Any]] = [*found]
    try:
        if body.get("following", info["tokens_per_payload"] > 0):
            arrays.append(index.following(found[0]))
        if body.get("payloads"):
            said["payloads"] = index.payloads(found[0])
    except Exception as error:  # fails alone
        return error
    return said, arrays
