"""The asking side of `search:<index>`: vectors in, neighbours out. Knows the body's fields, no faiss."""

from typing import Any

import numpy as np

from ..schema.errors import WorkerFailed
from .results import Hits, Reply


def search_body(payloads: bool, **options: Any) -> dict[str, Any]:
    """The fields of a search; those that are None are the index's own choice."""
    return {"payloads": payloads, **{name: value for name, value in options.items() if value is not None}}


def rows_of(vectors: Any) -> Any:
    """Queries as a tensor [m, d]; one vector [d] counts as one query."""
    if isinstance(vectors, np.ndarray | list | tuple):
        return np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    return vectors


def is_text(query: Any) -> bool:
    """Whether a query is text, or several texts, and no vectors."""
    return isinstance(query, str) or (isinstance(query, list | tuple) and bool(query) and isinstance(query[0], str))


def encoder_of(info: dict[str, Any]) -> str:
    """Who makes an index's vectors of text, by what the index says of itself: `embed:` and its encoder or its model.

    Empty for an index of texts, which needs nobody.

    Raises:
        WorkerFailed: it names neither.
    """
    if info.get("kind") == "text":
        return ""
    name = info.get("encoder") or info.get("model")
    if not isinstance(name, str) or not name:
        raise WorkerFailed("the index names no encoder of its vectors: search it with vectors")
    return f"embed:{name}"


def vectors_of(reply: Reply) -> Any:
    """The vectors [texts, d] that an `embed` service answered with.

    Raises:
        WorkerFailed: there are none.
    """
    if len(reply.tensors) != 1:
        raise WorkerFailed("the embedding answered without vectors: is another program serving its name?")
    return reply.tensors[0].numpy()


def hits_of(reply: Reply) -> Hits:
    """The reply of an index as arrays.

    Raises:
        WorkerFailed: the reply holds no ids and distances.
    """
    if len(reply.tensors) < 2:
        raise WorkerFailed("the index answered without ids and distances: is another program serving its name?")
    ids, distances = reply.tensors[0].numpy(), reply.tensors[1].numpy()
    found, shards = reply.body.get("shards", (1, 1))
    return Hits(ids, distances, reply.body.get("payloads", [[] for _ in ids]), (found, shards))
