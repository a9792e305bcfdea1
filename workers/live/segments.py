"""The states of a live index: segments that never change and which of their rows are alive. Knows no log, no thread.

A change makes a new state that shares what did not change; a search in the old one goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

from ...client.fanout import best
from ..index.quantizer import METRICS
from ..index.query import Found, Metric, Params
from ..index.segment import Allowed, Segment

RECENT: Final = 1024  # rows of the segment that each add writes anew

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A segment with tombstones.

    Attributes:
        ids: of its rows, int64 [n], ascending.
        alive: bool [n]; None where all are.
        growing: whether the next add may write it anew, with more rows.
    """

    segment: Segment
    ids: Ids
    alive: Allowed | None = None
    growing: bool = False

    @property
    def count(self) -> int:
        """Rows that are alive."""
        return len(self.ids) if self.alive is None else int(np.count_nonzero(self.alive))

    def living(self) -> NDArray[np.int64]:
        """The rows that are alive."""
        return np.arange(len(self.ids)) if self.alive is None else np.flatnonzero(self.alive)

    def rows(self, ids: Ids) -> NDArray[np.int64]:
        """The row of each id that is alive here; -1 for others."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        known = self.ids[rows] == ids
        if self.alive is not None:
            known &= self.alive[rows]
        return np.where(known, rows, -1)

    def without(self, ids: Ids) -> Part:
        """The same with those ids dead."""
        rows = self.rows(ids)
        rows = rows[rows >= 0]
        if not len(rows):
            return self
        alive = np.ones(len(self.ids), np.bool_) if self.alive is None else self.alive.copy()
        alive[rows] = False
        return replace(self, alive=alive)

    def only(self, ids: Ids) -> Allowed:
        """Which rows are alive and among `ids`, bool [n]."""
        allowed = np.zeros(len(self.ids), np.bool_)
        rows = self.rows(ids)
        allowed[rows[rows >= 0]] = True
        return allowed


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """All that is alive after the change `seq`; an id is alive in one part at most."""

    metric: Metric
    parts: tuple[Part, ...] = ()
    seq: int = 0

    @property
    def count(self) -> int:
        """Entries that are alive."""
        return sum(part.count for part in self.parts)

    def has(self, ids: Ids) -> Allowed:
        """Which of the ids are alive, bool [n]."""
        found = np.zeros(len(ids), np.bool_)
        for part in self.parts:
            found |= part.rows(ids) >= 0
        return found

    def search(
        self,
        queries: Vectors,
        params: Params,
        allowed: Sequence[Allowed | None],
        lists: NDArray[np.int64] | None,
        coarse: Vectors | None,
        threads: int,
    ) -> Found:
        """The k nearest of all parts, by (distance, id); `allowed` are the rows of each part that may be found."""
        found = [
            part.segment.search(queries, params, rows, lists, coarse, threads=threads)
            for part, rows in zip(self.parts, allowed, strict=True)
        ]
        return nearest(found, len(queries), params.k, self.metric)

    def changed(self, seq: int, dead: Ids, ids: Ids, vectors: Vectors) -> State:
        """With `dead` gone and then vectors added as `ids`, none of which is alive then."""
        parts = [part.without(dead) for part in self.parts] if len(dead) else list(self.parts)
        if len(ids):
            if parts and parts[-1].growing and parts[-1].count + len(ids) <= RECENT:
                last = parts.pop()
                rows = last.living()
                ids = np.concatenate([last.ids[rows], ids])
                vectors = np.concatenate([stored(last.segment.index)[rows], vectors])
            elif parts:
                parts[-1] = replace(parts[-1], growing=False)
            parts.append(flat(ids, vectors, self.metric))
        return replace(self, parts=tuple(part for part in parts if part.count), seq=seq)

    def sealed(self) -> State:
        """The same, with no part that the next add writes anew."""
        return replace(self, parts=tuple(replace(part, growing=False) for part in self.parts))

    def merged(self, before: Sequence[Part], made: Segment | None) -> State:
        """With `made` in the place of those parts, whose entries were alive in `before`; what died since stays dead."""
        now = {id(part.segment): part for part in self.parts}
        replaced = {id(part.segment) for part in before}
        kept = tuple(part for part in self.parts if id(part.segment) not in replaced)
        if made is None:
            return replace(self, parts=kept)
        fresh = part_of(made)
        for part in before:
            current = now.get(id(part.segment))
            ids = part.ids[part.living()]
            fresh = fresh.without(ids if current is None else ids[current.rows(ids) < 0])
        return replace(self, parts=(fresh, *kept) if fresh.count else kept)


@dataclass(slots=True, eq=False)
class Draft:
    """Changes of one group upon a state, each whole, in their order; the state itself stays as it is."""

    state: State
    seq: int
    _dead: set[int] = field(default_factory=set)
    _fresh: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def has(self, ids: Ids) -> Allowed:
        """Which of the ids are alive by now."""
        found = self.state.has(ids)
        if self._dead or self._fresh:
            for place, number in enumerate(ids.tolist()):
                found[place] = number in self._fresh or (bool(found[place]) and number not in self._dead)
        return found

    def change(self, dead: Ids, ids: Ids, vectors: Vectors) -> None:
        """One change more: ids that are alive die, then others are added."""
        self.seq += 1
        for number in dead.tolist():
            if self._fresh.pop(number, None) is None:
                self._dead.add(number)
        self._fresh.update(zip(ids.tolist(), vectors, strict=True))

    def result(self) -> State:
        """The state behind all of them."""
        dead = np.fromiter(self._dead, np.int64, len(self._dead))
        ids = np.fromiter(self._fresh, np.int64, len(self._fresh))
        vectors = np.stack(list(self._fresh.values())) if self._fresh else np.empty((0, 0), np.float32)
        return self.state.changed(self.seq, dead, ids, vectors)


def part_of(segment: Segment, growing: bool = False) -> Part:
    """A segment whose rows are all alive."""
    ids = np.arange(segment.index.ntotal) if segment.ids is None else segment.ids
    return Part(segment, ids, growing=growing)


def flat(ids: Ids, vectors: Vectors, metric: Metric) -> Part:
    """Vectors [n, d], as they are stored, in a segment that compares them all."""
    order = np.argsort(ids)
    index = faiss.IndexFlat(vectors.shape[1], METRICS[metric])
    index.add(np.ascontiguousarray(vectors[order]))
    return part_of(Segment(index, ids[order], metric), growing=len(ids) < RECENT)


def stored(index: faiss.Index) -> Vectors:
    """All vectors [n, d] of a flat index, or of the storage of a graph: a view, or decoded where they are codes."""
    if isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    if isinstance(index, faiss.IndexFlat):
        shape = (index.ntotal, index.d)
        flat_view: Vectors = faiss.rev_swig_ptr(index.get_xb(), shape[0] * shape[1]).reshape(shape)
        return flat_view
    decoded: Vectors = index.reconstruct_n(0, index.ntotal)
    return decoded


def nearest(found: Sequence[Found], rows: int, k: int, metric: Metric) -> Found:
    """The k best of what several segments found, exactly: by (distance, id); -1 and infinitely far for none."""
    far = np.float32(np.inf if metric == "l2" else -np.inf)
    if len(found) == 1:
        return found[0]
    if not found:
        return np.full((rows, k), -1, np.int64), np.full((rows, k), far, np.float32)
    ids = np.concatenate([each[0] for each in found], 1)
    distances = np.concatenate([each[1] for each in found], 1)
    order = best(ids, distances, k, nearest_first=metric == "l2")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
