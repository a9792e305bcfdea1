"""The asking side of `search:<index>`: vectors in, neighbours out. Knows the body's fields, no faiss."""

from typing import Any

import numpy as np

from ..schema.errors import WorkerFailed
from .results import Hits, Reply


def search_request(vectors: Any, k: int, nprobe: int | None, payloads: bool) -> tuple[dict[str, Any], list[Any]]:
    """Body and tensors of a search; one vector [d] counts as one query."""
    if isinstance(vectors, np.ndarray | list | tuple):
        vectors = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    body: dict[str, Any] = {"k": k, "following": False, "payloads": payloads}
    return (body if nprobe is None else {**body, "nprobe": nprobe}), [vectors]


def model_of(info: Reply) -> str:
    """The model that made an index's vectors, by what the index says of itself.

    Raises:
        WorkerFailed: it names none.
    """
    model = info.body.get("model")
    if not isinstance(model, str) or not model:
        raise WorkerFailed("the index does not say which model made it: search it with vectors")
    return model


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
    return Hits(ids, distances, reply.body.get("payloads", [[] for _ in ids]))
