"""Merging segments of a live index into one, their dead rows left out. Knows faiss, no log, no thread."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from ..index.quantizer import METRICS
from ..index.query import Metric
from ..index.segment import Segment
from .segments import Part, Vectors, stored

MANY: Final = 8  # small segments, above which they are merged
SMALL: Final = 8192  # rows of a small one
DEAD_SHARE: Final = 4  # one row in so many dead: a segment is written anew
_DEAD_LEAST: Final = 256
_TRAINED_PER_LIST: Final = 39  # the fewest points a centroid that faiss trains without a warning
_CODES: Final = 256  # centroids of each part of a product quantizer
_ROWS_AT_ONCE: Final = 65_536
_LISTS = re.compile(r"IVF(\d+)")

InvertedFile = Any  # faiss.IndexIVF, whose stubs leave out most of it


def wanted(factory: str) -> int:
    """How many vectors an index of that kind is trained on; 0 for kinds that learn nothing."""
    lists = _LISTS.match(factory)
    return _TRAINED_PER_LIST * max(int(lists[1]), _CODES if ",PQ" in factory else 1) if lists else 0


def chosen(parts: Sequence[Part], factory: str, trained: bool) -> list[Part]:
    """What is to be merged into one now; nothing where all is well.

    Small segments go together once they are many, with larger ones of at most twice their sum, so that each entry is
    written about log(n) times. Large ones of another kind than the factory's and ones with many dead rows are written
    anew; and all go together once there are enough vectors to train an inverted file.
    """
    learns = wanted(factory)
    if not trained and 0 < learns <= sum(part.count for part in parts):
        return list(parts)
    small = [part for part in parts if len(part.ids) < SMALL]
    large = sorted((part for part in parts if len(part.ids) >= SMALL), key=lambda part: part.count)
    merging = small if len(small) > MANY else []
    if factory != "Flat" and (trained or not learns):
        merging = merging + [part for part in large if isinstance(part.segment.index, faiss.IndexFlat)]
    if not merging:
        return [part for part in parts if _dead(part) >= max(_DEAD_LEAST, len(part.ids) // DEAD_SHARE)]
    total = sum(part.count for part in merging)
    for part in large:
        if part.count > 2 * total:
            break
        if part not in merging:
            merging.append(part)
            total += part.count
    return merging


def _dead(part: Part) -> int:
    return len(part.ids) - part.count


def emptied(index: faiss.Index) -> InvertedFile | None:
    """A trained inverted file like this one without its vectors; None for other kinds."""
    if not isinstance(index, faiss.IndexIVF):
        return None
    copy = faiss.clone_index(index)
    copy.reset()
    return copy


def trained(parts: Sequence[Part], factory: str, metric: Metric, threads: int) -> InvertedFile | None:
    """An empty inverted file trained on what is alive in flat parts; None where that is too little."""
    points = wanted(factory)
    living = [(part, part.living()) for part in parts]
    total = sum(len(rows) for _, rows in living)
    if not points or total < points:
        return None
    faiss.omp_set_num_threads(threads)
    vectors = np.concatenate([stored(part.segment.index)[rows] for part, rows in living])
    sample = np.sort(np.random.default_rng(0).choice(total, points, replace=False))
    index = faiss.index_factory(vectors.shape[1], factory, METRICS[metric])
    index.train(np.ascontiguousarray(vectors[sample]))
    return index


def merged(
    parts: Sequence[Part], factory: str, blank: InvertedFile | None, metric: Metric, threads: int
) -> Segment | None:
    """One segment of all that is alive in the parts, by ascending id; None where nothing is.

    An inverted file takes over codes as they are: no vector is encoded twice. `blank` is the trained empty one; without
    it what an inverted file will hold is flat.
    """
    faiss.omp_set_num_threads(threads)
    living = [(part, part.living()) for part in parts]
    living = [(part, rows) for part, rows in living if len(rows)]
    if not living:
        return None
    ids = np.concatenate([part.ids[rows] for part, rows in living])
    order = np.argsort(ids)
    if blank is not None:
        return Segment(_lists(living, order, blank), ids[order], metric)
    kind = "Flat" if wanted(factory) else factory
    dimension = living[0][0].segment.index.d
    index = faiss.index_factory(dimension, kind, METRICS[metric])
    vectors = np.concatenate([stored(part.segment.index)[rows] for part, rows in living])
    for start in range(0, len(order), _ROWS_AT_ONCE):
        index.add(np.ascontiguousarray(vectors[order[start : start + _ROWS_AT_ONCE]]))
    return Segment(index, ids[order], metric)


def _lists(
    living: Sequence[tuple[Part, NDArray[np.int64]]], order: NDArray[np.int64], blank: InvertedFile
) -> InvertedFile:
    """Every list of the merged file: the living entries of that list in each part, by their new rows."""
    target: InvertedFile = faiss.clone_index(blank)
    place = np.empty(len(order), np.int64)  # new row of each living row, in the order of the parts
    place[order] = np.arange(len(order))
    sources: list[tuple[InvertedFile, NDArray[np.int64]]] = []
    start = 0
    for part, rows in living:
        news = np.full(len(part.ids), -1, np.int64)
        news[rows] = place[start : start + len(rows)]
        start += len(rows)
        index = part.segment.index
        sources.append((index if isinstance(index, faiss.IndexIVF) else _encoded(stored(index), blank), news))
    for number in range(target.nlist):
        found = [_entries(index, number, news) for index, news in sources]
        rows = np.concatenate([each[0] for each in found])
        if len(rows):
            first = np.argsort(rows)
            codes = np.ascontiguousarray(np.concatenate([each[1] for each in found])[first])
            rows = np.ascontiguousarray(rows[first])
            target.invlists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(codes))
    target.ntotal = len(order)
    return target


def _encoded(vectors: Vectors, blank: InvertedFile) -> InvertedFile:
    index = faiss.clone_index(blank)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        index.add(np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE]))
    return index


def _entries(index: InvertedFile, number: int, news: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """New rows and codes of one list's living entries; read where searches read, nothing is written."""
    lists = index.invlists
    size, width = lists.list_size(number), index.code_size
    if not size:
        return np.empty(0, np.int64), np.empty((0, width), np.uint8)
    rows = news[faiss.rev_swig_ptr(lists.get_ids(number), size)]
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * width).reshape(size, width)
    return rows[rows >= 0], codes[rows >= 0]
