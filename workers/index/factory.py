"""The faiss index of given vectors, whole or in shards: its string, training, filling. Knows no file and no payload."""

from __future__ import annotations

import heapq
import math
import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from .directory import OutputError
from .progress import Progress, silent
from .quantizer import METRICS, normalised
from .query import Metric

FLAT_BELOW: Final = 20_000
_TRAINED_PER_LIST: Final = 39  # the fewest points a centroid that faiss trains without a warning
_CODES: Final = 256  # centroids of each part of a product quantizer
_ROWS_AT_ONCE: Final = 65_536
_SERVED = re.compile(r"Flat|IVF(?P<lists>[1-9]\d{0,6}),(Flat|SQ8|PQ(?P<parts>[1-9]\d{0,3}))|HNSW[1-9]\d{0,2}(,Flat)?")
_STRINGS = "Flat, IVF<lists>,Flat, IVF<lists>,SQ8, IVF<lists>,PQ<bytes> or HNSW<links>"

Layout = Literal["rows", "list"]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """The faiss index of each shard with the rows of the vectors that it holds, int64 ascending.

    `owners`: the shard of each list, int32 [nlist], where vectors were spread by list.
    """

    shards: list[tuple[faiss.Index, Rows]]
    owners: NDArray[np.int32] | None


def default_factory(ntotal: int) -> str:
    """faiss's string for `ntotal` vectors: exact below 20,000, else an inverted file of about sqrt(n) lists.

    Four times as many lists took eight times as long to train and fill at 250,000, and predicted no better.
    """
    return "Flat" if ntotal < FLAT_BELOW else f"IVF{round(math.sqrt(ntotal))},Flat"


def check_factory(string: str, *, width: int = 0, total: int = 0, shards: int = 1, by: Layout = "rows") -> None:
    """Raises OutputError for an index string that is not served, or not of `total` vectors of `width` (0: unknown)."""
    found = _SERVED.fullmatch(string)
    if found is None:
        raise OutputError(f"{string!r}: no such index is served; give {_STRINGS}")
    lists, parts = int(found["lists"] or 0), int(found["parts"] or 0)
    if by == "list" and not lists:
        raise OutputError(f"{string!r}: has no lists to spread by; give --by rows, or a string with IVF")
    if by == "list" and shards > lists:
        raise OutputError(f"{string!r}: {lists} lists for {shards} shards; give fewer shards or more lists")
    if parts and width % parts:
        raise OutputError(f"{string!r}: {width} dimensions are no multiple of {parts}; give a divisor of {width}")
    if parts and 0 < total < _CODES:
        raise OutputError(f"{string!r}: needs {_CODES} vectors to train its codes, {total} came; give IVF<lists>,Flat")
    if 0 < total < lists:
        raise OutputError(f"{string!r}: {lists} lists for {total} vectors; give at most {total}")


def filled(
    vectors: NDArray[np.float32],
    string: str,
    metric: Metric,
    *,
    shards: int = 1,
    by: Layout = "rows",
    threads: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> Filled:
    """Trains once and fills each shard; all shards share quantizer and codes.

    By rows, shard i of n holds rows i, i + n, ...; by list, whole lists, about as many vectors in each shard.
    Raises OutputError.
    """
    check_factory(string, width=vectors.shape[1], total=len(vectors), shards=shards, by=by)
    # OpenMP's thread count belongs to the calling thread, so it is set here.
    faiss.omp_set_num_threads(threads)
    empty = _trained(vectors, string, metric, seed, progress)
    if by == "rows":
        rows, owners, lists = [np.arange(shard, len(vectors), shards) for shard in range(shards)], None, None
    else:
        assert isinstance(empty, faiss.IndexIVF)
        lists = _lists(empty, vectors, metric, progress)
        owners = _owners(np.bincount(lists, minlength=empty.nlist), shards)
        rows = [np.flatnonzero(owners[lists] == shard) for shard in range(shards)]
    made, done = [], 0
    for own in rows:
        index = empty if shards == 1 else faiss.clone_index(empty)
        for start in range(0, len(own), _ROWS_AT_ONCE):
            here = own[start : start + _ROWS_AT_ONCE]
            _add(index, _compared(vectors, here, metric), None if lists is None else lists[here])
            done += len(here)
            progress("fill", done, len(vectors))
        made.append((index, own))
    return Filled(made, owners)


def _trained(vectors: NDArray[np.float32], string: str, metric: Metric, seed: int, progress: Progress) -> faiss.Index:
    total, width = vectors.shape
    index = faiss.index_factory(width, string, METRICS[metric])
    if isinstance(index, faiss.IndexIVF):
        index.cp.seed = seed
        if isinstance(index, faiss.IndexIVFPQ):
            codes: Any = index
            codes.do_polysemous_training = False  # 6 s for an order of codes that no search here makes use of
        rows = min(total, _TRAINED_PER_LIST * max(index.nlist, _CODES if "PQ" in string else 1))
        sample = np.random.default_rng(seed).choice(total, rows, replace=False)
        progress("train", 0, 1)
        index.train(_compared(vectors, np.sort(sample), metric))
        progress("train", 1, 1)
    return index


def _compared(vectors: NDArray[np.float32], rows: Rows, metric: Metric) -> NDArray[np.float32]:
    """Those rows as they are compared: of length 1 for cosine."""
    chosen = np.ascontiguousarray(vectors[rows])
    if not np.isfinite(chosen).all():
        raise OutputError(f"vectors {rows[0]} to {rows[-1]} hold NaN or infinity; mend what made them")
    return normalised(chosen) if metric == "cosine" else chosen


def _lists(index: faiss.IndexIVF, vectors: NDArray[np.float32], metric: Metric, progress: Progress) -> Rows:
    """The list of each vector."""
    lists = np.empty(len(vectors), np.int64)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = np.arange(start, min(len(vectors), start + _ROWS_AT_ONCE))
        lists[rows] = index.quantizer.assign(_compared(vectors, rows, metric), 1)[:, 0]
        progress("assign", start + len(rows), len(vectors))
    return lists


def _owners(sizes: Rows, shards: int) -> NDArray[np.int32]:
    """The shard of each list: the largest first, each to the shard that has the fewest vectors, then lists, so far."""
    owners = np.empty(len(sizes), np.int32)
    loads = [(0, 0, shard) for shard in range(shards)]
    for number in np.argsort(-sizes, kind="stable").tolist():
        load, count, shard = heapq.heappop(loads)
        owners[number] = shard
        heapq.heappush(loads, (load + int(sizes[number]), count + 1, shard))
    return owners


def _add(index: Any, vectors: NDArray[np.float32], lists: Rows | None) -> None:
    if lists is None:
        index.add(vectors)
        return
    ids = np.arange(index.ntotal, index.ntotal + len(vectors))
    index.add_core(len(vectors), *(faiss.swig_ptr(array) for array in (vectors, ids, np.ascontiguousarray(lists))))
