"""What an index is asked: the parameters of a search with every check, and what anything searchable offers.

Knows no faiss and no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...schema.errors import Refused
from .filter import Filter, parse

MAX_K: Final = 1024
MAX_EF: Final = 65_536
MAX_HITS: Final = 1 << 22  # rows x k of one query: its reply with payloads stays under a message's 256 MiB
DEFAULT_K: Final = 10
DEFAULT_NPROBE: Final = 8
DEFAULT_EF: Final = 64

Metric = Literal["l2", "ip", "cosine"]
Found = tuple[NDArray[np.int64], NDArray[np.float32]]
"""ids int64 [m, k] and distances float32 [m, k], each row by (distance, id), best first; -1 and infinitely far where
fewer than k are found."""
Counted = tuple[dict[str, Any], list[NDArray[Any]]]


class BadQuery(Refused, ValueError):
    """A query the index refuses before it searches; one line that says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Params:
    """What a search is asked for, checked; equal ones may be served in one call.

    Attributes:
        nprobe: lists that an inverted file looks into; None for the server's own number. Other kinds take no notice.
        ef: candidates that an HNSW graph keeps; None for the server's own number. Other kinds take no notice.
        exact: compare with every vector, as it is stored.
        effort: the server's own nprobe or ef, for requests that name none; None for the defaults of this page.
    """

    k: int = DEFAULT_K
    nprobe: int | None = None
    ef: int | None = None
    filter: Filter | None = None
    exact: bool = False
    effort: int | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any], nlist: int = 0) -> Params:
        """From the fields of a request to an index of `nlist` lists (0 for none). Raises BadQuery, BadFilter."""
        k, nprobe, ef, exact = body.get("k", DEFAULT_K), body.get("nprobe"), body.get("ef"), body.get("exact", False)
        if type(k) is not int or not 1 <= k <= MAX_K:
            raise BadQuery(f"k is {k!r}; send a whole number from 1 to {MAX_K}")
        if nprobe is not None:
            if type(nprobe) is not int or nprobe < 1:
                raise BadQuery(f"nprobe is {nprobe!r}; send a whole number of at least 1")
            if nlist and nprobe > nlist:
                raise BadQuery(f"nprobe is {nprobe}, the index has {nlist} lists; send at most {nlist}")
        if ef is not None and (type(ef) is not int or not 1 <= ef <= MAX_EF):
            raise BadQuery(f"ef is {ef!r}; send a whole number from 1 to {MAX_EF}")
        if type(exact) is not bool:
            raise BadQuery(f"exact is {exact!r}; send true or false")
        condition = body.get("filter")
        return cls(k, nprobe, ef, None if condition is None else parse(condition), exact)


def check_queries(queries: NDArray[Any], dimension: int, name: str, k: int = 1) -> NDArray[np.float32]:
    """The queries, contiguous and aligned. Raises BadQuery unless finite float32 [m, dimension] with m k <= 4 Mi."""
    if queries.dtype != np.float32:
        raise BadQuery(f"queries are {queries.dtype}; send float32")
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise BadQuery(f"queries have shape {list(queries.shape)}; the index {name} wants [m, {dimension}]")
    if len(queries) * k > MAX_HITS:
        raise BadQuery(f"{len(queries)} queries of k {k} are over {MAX_HITS} hits; send them in parts")
    if not np.isfinite(queries).all():
        raise BadQuery("queries hold NaN or infinity; send finite numbers")
    return np.require(queries, requirements=["C", "A"])


def check_lists(
    lists: NDArray[Any], coarse: NDArray[Any], rows: int, nlist: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """List ids and coarse distances of an asker, contiguous and aligned.

    Raises BadQuery unless they are int64 [rows, nprobe] of -1 (none) to nlist - 1 and finite float32 of that shape.
    """
    if not nlist:
        raise BadQuery("this index has no lists; send the queries alone")
    if lists.dtype != np.int64 or lists.ndim != 2 or len(lists) != rows or not 1 <= lists.shape[1] <= nlist:
        raise BadQuery(
            f"list ids are {lists.dtype} {list(lists.shape)}; send int64 [{rows}, nprobe], nprobe from 1 to {nlist}"
        )
    if coarse.dtype != np.float32 or coarse.shape != lists.shape:
        raise BadQuery(f"coarse distances are {coarse.dtype} {list(coarse.shape)}; send float32 {list(lists.shape)}")
    if lists.size and (lists.min() < -1 or lists.max() >= nlist):
        raise BadQuery(f"list ids leave the index; send -1 (none) to {nlist - 1}")
    if not np.isfinite(coarse).all():
        raise BadQuery("coarse distances hold NaN or infinity; send finite numbers")
    return np.require(lists, requirements=["C", "A"]), np.require(coarse, requirements=["C", "A"])


class Searchable(Protocol):
    """One state of an index that does not change: whatever is asked of it belongs to one version."""

    @property
    def dimension(self) -> int: ...

    @property
    def nlist(self) -> int: ...

    def info(self) -> dict[str, Any]:
        """What the index says of itself, the answer to {"info": true}."""

    def search(
        self,
        queries: NDArray[np.float32],
        params: Params,
        lists: NDArray[np.int64] | None = None,
        coarse: NDArray[np.float32] | None = None,
        *,
        threads: int = 1,
    ) -> Found:
        """The nearest entries of checked queries [m, d], within the asker's own lists where they are given."""

    def following(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tokens behind each entry, int32 [*ids.shape, 8], -1 for none. Raises BadQuery where it has no tokens."""

    def ngrams(self, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Counted:
        """See NgramTable.answer. Raises BadQuery where it has no tokens."""

    def payloads(self, ids: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
        """What is known of each entry of `ids` [m, k]: a map; {} for id -1."""

    def centroids(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Centroids float32 [nlist, d] and the shard of each list, int32 [nlist]. Raises BadQuery for no lists."""

    def assign(self, queries: NDArray[np.float32], params: Params) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The lists int64 [m, nprobe] that a search looks into, and their coarse distances. Raises BadQuery."""


class Source(Protocol):
    """What a server holds: something searchable that may change."""

    def view(self) -> Searchable:
        """The state of now. What is answered from one view belongs to one version."""
