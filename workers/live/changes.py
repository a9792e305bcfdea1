"""What changes a live index, checked: vectors to add, ids to delete. Knows no log, no segment, no thread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...schema.errors import Refused
from ..index.fields import BadFields, dump_fields
from ..index.quantizer import normalised

MAX_ROWS: Final = 1 << 20  # of one change
MAX_DEPTH: Final = 8  # of maps whose names a filter can use
LAST_ID: Final = (1 << 63) - 1


class BadChange(Refused, ValueError):
    """A change that is refused before anything is changed; one line that says what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One checked change: what is added, or what is deleted where there are no vectors.

    Attributes:
        ids: int64 [n]; None where the index gives them.
        vectors: as they are stored, float32 [n, d]; None for a delete.
        fields: JSON texts [n].
        names: JSON paths of the fields.
        upsert: entries of the same ids are replaced; else they are a reason to refuse.
        request: names the request it came with, so that one that comes again is not done twice; b"" for none.
        done: the ids that were added, or how many were deleted: int64 [n] or [1].
    """

    ids: NDArray[np.int64] | None
    vectors: NDArray[np.float32] | None = None
    fields: Sequence[str] = ()
    names: frozenset[str] = frozenset()
    upsert: bool = False
    request: bytes = b""
    done: Future[NDArray[np.int64]] = field(default_factory=Future)

    def reply(self, answer: NDArray[np.int64]) -> bytes:
        """What is kept of the answer: nothing where the request itself holds it."""
        return b"" if self.vectors is not None and self.ids is not None else answer.tobytes()

    def again(self, reply: bytes | None) -> NDArray[np.int64] | None:
        """The answer of which `reply` was kept; None where none was."""
        if reply is None:
            return None
        return self.ids if self.vectors is not None and self.ids is not None else np.frombuffer(reply, np.int64)


@dataclass(frozen=True, slots=True)
class Room:
    """What an index takes: vectors of one dimension, and the ids with id % shards == shard."""

    name: str
    dimension: int
    metric: str
    shard: int = 0
    shards: int = 1

    def add(
        self,
        vectors: NDArray[Any],
        ids: NDArray[Any] | None = None,
        fields: Sequence[Any] | None = None,
        *,
        upsert: bool = False,
        request: bytes = b"",
    ) -> Change:
        """Vectors to add, one copy of the asker's. Raises BadChange."""
        if type(upsert) is not bool:
            raise BadChange(f"upsert is {upsert!r}; send true or false")
        if vectors.dtype != np.float32 or vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise BadChange(
                f"vectors are {vectors.dtype} {list(vectors.shape)}; the index {self.name} takes float32 "
                f"[n, {self.dimension}]"
            )
        if len(vectors) > MAX_ROWS:
            raise BadChange(f"{len(vectors)} vectors at once; send at most {MAX_ROWS}")
        if not np.isfinite(vectors).all():
            raise BadChange("vectors hold NaN or infinity; send finite numbers")
        if ids is not None:
            ids = self._own(ids)
            if len(ids) != len(vectors):
                raise BadChange(f"{len(ids)} ids for {len(vectors)} vectors; send one for each")
            if len(np.unique(ids)) != len(ids):
                raise BadChange("an id comes twice; send each once")
        if fields is None:
            fields = [{}] * len(vectors)
        if not isinstance(fields, list | tuple) or len(fields) != len(vectors):
            raise BadChange(f"fields are no list of {len(vectors)} maps; send one for each vector")
        kept = normalised(vectors) if self.metric == "cosine" else np.array(vectors, np.float32, order="C")
        names = frozenset(path for each in fields for path in paths(each))
        return Change(ids, kept, self._texts(fields), names, upsert, request)

    def delete(self, ids: NDArray[Any], *, request: bytes = b"") -> Change:
        """Ids to delete, those that are not there counting nothing. Raises BadChange."""
        return Change(np.unique(self._checked(ids)), request=request)

    def _own(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        found = self._checked(ids)
        if self.shards > 1 and (found % self.shards != self.shard).any():
            raise BadChange(
                f"shard {self.shard} holds the ids with id % {self.shards} == {self.shard}; send others there"
            )
        return found

    def _checked(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        if ids.dtype != np.int64 or ids.ndim != 1:
            raise BadChange(f"ids are {ids.dtype} {list(ids.shape)}; send int64 [n]")
        if len(ids) > MAX_ROWS:
            raise BadChange(f"{len(ids)} ids at once; send at most {MAX_ROWS}")
        if len(ids) and (ids.min() < 0 or ids.max() == LAST_ID):
            raise BadChange(f"ids leave 0 to {LAST_ID - 1}; send others, or none and the index gives them")
        return np.array(ids, np.int64)

    def _texts(self, fields: Sequence[Any]) -> list[str]:
        texts = []
        for number, each in enumerate(fields):
            try:
                texts.append(dump_fields(each))
            except BadFields as fault:
                raise BadChange(f"fields of vector {number}: {fault}; send a map that JSON holds") from None
        return texts


def paths(fields: Any, above: str = "$", depth: int = MAX_DEPTH) -> Iterator[str]:
    """The JSON paths by which a filter names what is in a map."""
    if not isinstance(fields, Mapping) or not depth:
        return
    for name, value in fields.items():
        path = f'{above}."{name}"'
        yield path
        yield from paths(value, path, depth - 1)
