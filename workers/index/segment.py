"""Vectors that do not change, searched with faiss: the one place that calls its search. Knows no file, no payload."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from ...client.fanout import best
from .quantizer import assigned, compared, normalised
from .query import DEFAULT_EF, DEFAULT_NPROBE, Found, Metric, Params

FEW: Final = 10_000  # allowed rows that are all compared, where the request names no nprobe
GRAPH_SHARE: Final = 0.1  # of a graph's rows: a filter that allows fewer is searched without the graph
BY_LIST: Final = 1 << 24  # numbers that the pairs of queries and lists of one call hold, when searched list by list
BY_LIST_K: Final = 32  # neighbours up to which merging what the lists gave costs little
_faiss: Any = faiss  # whose type stubs lack half of it
_QUERY_PARALLEL: Final = 3  # IndexIVF.parallel_mode: threads share the queries, in search_preassigned too (0: not)

Allowed = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A faiss index (Flat, IVF or HNSW) of n vectors in rows 0 to n - 1; safe to search from several threads at once.

    Attributes:
        ids: of the rows, int64 [n]; None where they are the rows' own numbers. In ascending order, equal distances at
            the k-th place go to the lower ids as far as faiss sees them in order.
        metric: of "cosine" the stored vectors have length 1, and queries get it here; its distances are cosines.
    """

    index: faiss.Index
    ids: NDArray[np.int64] | None
    metric: Metric

    def __post_init__(self) -> None:
        if isinstance(self.index, faiss.IndexIVF):
            self.index.parallel_mode = _QUERY_PARALLEL

    @property
    def _any(self) -> Any:
        return self.index

    @property
    def nlist(self) -> int:
        """Lists of an inverted file; 0 where it is none."""
        return int(self.index.nlist) if isinstance(self.index, faiss.IndexIVF) else 0

    def search(
        self,
        queries: NDArray[np.float32],
        params: Params,
        allowed: Allowed | None = None,
        lists: NDArray[np.int64] | None = None,
        coarse: NDArray[np.float32] | None = None,
        *,
        threads: int = 1,
    ) -> Found:
        """The k nearest rows of each checked query [m, d], as ids; distances are faiss's (squared L2, inner products).

        A query's answer has the same bits whatever else is asked in the call.

        Args:
            allowed: bool [n], the rows that may be found; looked at inside the search. Where the request names no
                nprobe or ef, more lists or all rows are looked into until k of them are found, or all there are.
            lists, coarse: the lists to look into [m, nprobe] (-1 for none) and their distances; None: the nearest ones.
        """
        far = np.float32(np.inf if self.metric == "l2" else -np.inf)
        rows = self.index.ntotal if allowed is None else int(np.count_nonzero(allowed))
        if not len(queries) or not rows:
            shape = (len(queries), params.k)
            return np.full(shape, -1, np.int64), np.full(shape, far, np.float32)
        if self.metric == "cosine":
            queries = normalised(queries)
        # OpenMP keeps its thread count per calling thread, and calls come from a pool's threads.
        faiss.omp_set_num_threads(threads)
        selector = None if allowed is None else _Selector(allowed)
        if isinstance(self.index, faiss.IndexIVF):
            if lists is None or coarse is None:
                distances, found = self._in_own_lists(queries, params, rows, selector, far)
            else:
                distances, found = self._in_lists(queries, params.k, lists, coarse, selector, far)
        elif isinstance(self.index, faiss.IndexHNSW):
            distances, found = self._in_graph(queries, params, selector, rows)
        else:
            distances, found = compared(self.index, queries, params.k, _plain(selector))
        return self._sorted(found.astype(np.int64, copy=False), distances, far)

    def assign(self, queries: NDArray[np.float32], params: Params) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The lists int64 [m, nprobe] that a search of an inverted file looks into, and their coarse distances."""
        if self.metric == "cosine":
            queries = normalised(queries)
        return assigned(self._any.quantizer, queries, self._nprobe(params, self.index.ntotal, False))

    def centroids(self) -> NDArray[np.float32]:
        """Those of an inverted file, float32 [nlist, d]."""
        found: NDArray[np.float32] = faiss.downcast_index(self._any.quantizer).reconstruct_n(0, self.nlist)
        return found

    def _nprobe(self, params: Params, rows: int, filtered: bool) -> int:
        nlist = self.nlist
        if params.exact:
            return nlist
        if params.nprobe is not None:
            return min(params.nprobe, nlist)
        usual = params.effort or DEFAULT_NPROBE
        if filtered:
            usual = nlist if rows <= FEW else math.ceil(usual * self.index.ntotal / rows)
        return min(usual, nlist)

    def _in_own_lists(
        self,
        queries: NDArray[np.float32],
        params: Params,
        rows: int,
        selector: _Selector | None,
        far: np.float32,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """In the nearest lists; a query that finds too few of the allowed `rows` there looks into more of them."""
        nprobe, k = self._nprobe(params, rows, selector is not None), params.k
        distances, found = self._in_lists(queries, k, *assigned(self._any.quantizer, queries, nprobe), selector, far)
        widens = selector is not None and params.nprobe is None
        while widens and nprobe < self.nlist and len(short := _short(found, k, rows)):
            nprobe = min(self.nlist, 4 * nprobe)
            asked = queries[short]
            chosen = assigned(self._any.quantizer, asked, nprobe)
            distances[short], found[short] = self._in_lists(asked, k, *chosen, selector, far)
        return distances, found

    def _in_lists(
        self,
        queries: NDArray[np.float32],
        k: int,
        lists: NDArray[np.int64],
        coarse: NDArray[np.float32],
        selector: _Selector | None,
        far: np.float32,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """List by list, where so many queries come that lists are looked into more than once.

        On 400,000 x 256 in 1,024 lists, 256 queries of nprobe 8 took 0.4 of faiss's own time, which goes query by query
        and fetches each list from memory again. Codes of a product quantizer are too small for that.
        """
        nprobe = lists.shape[1]
        most = BY_LIST // (nprobe * (queries.shape[1] + 3 * k))  # queries at once
        several = 2 * min(len(queries), most) * nprobe >= self.nlist and k <= BY_LIST_K
        if not several or isinstance(self.index, faiss.IndexIVFPQ):
            return self._preassigned(queries, k, lists, coarse, selector)
        parts = [
            self._by_list(queries[part], lists[part], coarse[part], k, selector, far)
            for part in (slice(start, start + most) for start in range(0, len(queries), most))
        ]
        distances, found = zip(*parts, strict=True)
        return np.concatenate(distances), np.concatenate(found)

    def _by_list(
        self,
        queries: NDArray[np.float32],
        lists: NDArray[np.int64],
        coarse: NDArray[np.float32],
        k: int,
        selector: _Selector | None,
        far: np.float32,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Every pair of query and list as a query of its own, in the lists' order; then the k best of each query."""
        count, nprobe = lists.shape
        pairs = np.argsort(lists, axis=None, kind="stable")
        pairs = pairs[np.searchsorted(lists.ravel()[pairs], 0) :]  # -1 is no list
        asked, near = lists.ravel()[pairs, None], coarse.ravel()[pairs, None]
        distances = np.full((count * nprobe, k), far, np.float32)
        found = np.full((count * nprobe, k), -1, np.int64)
        distances[pairs], found[pairs] = self._preassigned(queries[pairs // nprobe], k, asked, near, selector)
        distances, found = distances.reshape(count, -1), found.reshape(count, -1)
        order = best(found, distances, k, nearest_first=self.metric == "l2")
        return np.take_along_axis(distances, order, 1), np.take_along_axis(found, order, 1)

    def _preassigned(
        self,
        queries: NDArray[np.float32],
        k: int,
        lists: NDArray[np.int64],
        coarse: NDArray[np.float32],
        selector: _Selector | None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """faiss's search_preassigned; its Python wrapper takes no parameters, so the C++ one is called."""
        shape = (len(queries), k)
        distances, found = np.empty(shape, np.float32), np.empty(shape, np.int64)
        asked = _faiss.SearchParametersIVF(nprobe=lists.shape[1])
        if selector is not None:
            asked.sel = selector.faiss
        arrays = [np.ascontiguousarray(array) for array in (queries, lists, coarse)]
        places = [faiss.swig_ptr(array) for array in arrays]
        outputs = faiss.swig_ptr(distances), faiss.swig_ptr(found)
        self._any.search_preassigned_c(len(queries), places[0], k, *places[1:], *outputs, False, asked)
        return distances, found

    def _in_graph(
        self, queries: NDArray[np.float32], params: Params, selector: _Selector | None, rows: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        few = selector is not None and rows <= max(FEW, GRAPH_SHARE * self.index.ntotal)
        storage: Any = faiss.downcast_index(self._any.storage)
        if params.exact or few:
            return compared(storage, queries, params.k, _plain(selector))
        ef = params.ef or math.ceil((params.effort or DEFAULT_EF) * self.index.ntotal / rows)
        asked = _faiss.SearchParametersHNSW(efSearch=max(ef, params.k))
        if selector is not None:
            asked.sel = selector.faiss
        distances, places = self._any.search(queries, params.k, params=asked)
        if selector is not None and params.ef is None and len(short := _short(places, params.k, rows)):
            distances[short], places[short] = compared(storage, queries[short], params.k, _plain(selector))
        return distances, places

    def _sorted(self, rows: NDArray[np.int64], distances: NDArray[np.float32], far: np.float32) -> Found:
        none = rows < 0
        if none.any():
            distances = np.where(none, far, distances).astype(np.float32)
        ids = rows if self.ids is None else np.where(none, -1, self.ids[np.where(none, 0, rows)])
        tied = np.flatnonzero(((distances[:, 1:] == distances[:, :-1]) & ~none[:, 1:]).any(axis=1))
        if len(tied):
            order = best(ids[tied], distances[tied], ids.shape[1], nearest_first=self.metric == "l2")
            ids[tied] = np.take_along_axis(ids[tied], order, 1)
            distances[tied] = np.take_along_axis(distances[tied], order, 1)
        return ids, distances


class _Selector:
    """faiss's bitmap of the allowed rows; keeps the bytes that faiss points into."""

    def __init__(self, allowed: Allowed) -> None:
        self._bits = np.packbits(allowed, bitorder="little")
        self.faiss = faiss.IDSelectorBitmap(len(self._bits), faiss.swig_ptr(self._bits))


def _short(found: NDArray[np.int64], k: int, rows: int) -> NDArray[np.int64]:
    """The queries that found fewer than k of the rows that there are."""
    return np.flatnonzero(np.count_nonzero(found >= 0, axis=1) < min(k, rows))


def _plain(selector: _Selector | None) -> Any:
    return None if selector is None else _faiss.SearchParameters(sel=selector.faiss)
