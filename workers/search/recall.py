"""How much of the truth live searches find: samples repeated exactly, and an nprobe or ef chosen by them.

Knows searchable indexes; no message, no faiss.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..index.query import DEFAULT_EF, DEFAULT_NPROBE, Found, Params, Searchable

WINDOW: Final = 512  # samples that the gauge is the mean of
WAITING: Final = 64  # samples that wait to be repeated, each with the state of the index that answered it; no more
CURVES: Final = 256  # latest samples by which the server's own effort is chosen
LEAST: Final = 32  # of them, before the first choice
EACH: Final = 16  # of them between two choices
BUSY: Final = 0.05  # share of one core's time that the repetitions may take
TUNING: Final = 0.5  # the same while a goal is set and nothing is chosen yet
TUNING_SHARE: Final = 0.1  # of queries that are sampled then, at least
_SURE: Final = 2.0  # standard errors by which a mean must be above the goal
_NICE: Final = 10  # lower priority than whatever answers requests
_FIRST: Final = {"nprobe": 1, "ef": 8}
_LAST_EF: Final = 4096

log = logging.getLogger("ralmq.index")


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One query [d] as it was answered: ids and distances [k]. `index` is the state that answered it."""

    index: Searchable
    params: Params
    query: NDArray[np.float32]
    ids: NDArray[np.int64]
    distances: NDArray[np.float32]


class Recall:
    """Samples live queries and repeats them in a thread of low priority.

    Args:
        share: of the queries that are sampled, 0 to 1.
        goal: the mean recall for which the server chooses nprobe or ef itself; 0 for none.
        effort: the server's own nprobe or ef to begin with; None for the defaults.
        nlist: of the index; 0 for one without lists, which a live one may get later. Where it is neither an inverted
            file nor a graph, effort is None.
        graph: whether it is a graph, with ef.
    """

    def __init__(
        self, share: float, goal: float, effort: int | None, nlist: int, graph: bool, *, seed: int = 0
    ) -> None:
        self.effort = effort
        self._share, self._goal = share, goal
        self.rungs: Sequence[int] = _rungs("ef", _LAST_EF) if graph else ()
        self._name = "ef" if graph else "nprobe"
        self._usual = DEFAULT_EF
        self._lists(nlist)
        self._random = np.random.default_rng(seed)
        self._waiting: deque[Sample] = deque()
        self._live: deque[float] = deque(maxlen=WINDOW)
        self._curves: deque[NDArray[np.float64]] = deque(maxlen=CURVES)
        self._fresh = 0
        self._chosen = False
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def gauges(self) -> dict[str, Any]:
        """`recall` is the mean over the latest samples, of `recall_queries` ones; none of both before the first."""
        with self._lock:
            said: dict[str, Any] = {}
            if self._live:
                said = {"recall": round(float(np.mean(self._live)), 4), "recall_queries": len(self._live)}
            if self.rungs:
                said[self._name] = self.effort or self._usual
            return said

    def offer(self, index: Searchable, params: Params, queries: NDArray[np.float32], found: Found) -> None:
        """Queries [m, d] that were just answered; a share of them is kept to be repeated."""
        self._lists(index.nlist)
        share = max(self._share, TUNING_SHARE) if self._tuning and params.effort == self.effort else self._share
        if not share or params.exact or not len(queries):
            return
        with self._lock:
            taken = np.flatnonzero(self._random.random(len(queries)) < share)
            for row in taken[: max(0, WAITING - len(self._waiting))].tolist():
                kept = (queries[row].copy(), found[0][row].copy(), found[1][row].copy())
                self._waiting.append(Sample(index, params, *kept))
            if len(taken):
                self._arrived.set()

    def _lists(self, nlist: int) -> None:
        if nlist and not self.rungs:
            self._usual = min(DEFAULT_NPROBE, nlist)
            self.rungs = _rungs("nprobe", nlist)

    def start(self) -> None:
        """Begins to repeat what is offered, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="recall", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the search in hand."""
        self._ended = True
        self._arrived.set()
        if self._thread is not None:
            self._thread.join()

    def step(self) -> bool:
        """Repeats one sample; false where none waits."""
        with self._lock:
            if not self._waiting:
                return False
            sample = self._waiting.popleft()
        params, query = sample.params, sample.query[None]
        ids, distances = sample.index.search(query, replace(params, exact=True))
        truth = _Truth(ids[0], distances[0], sample.index.info()["metric"] == "l2")
        live = truth.recall(sample.ids, sample.distances)
        own = params.nprobe is None and params.ef is None and params.filter is None
        curve = self._curve(sample, truth) if self._goal and self.rungs and own else None
        with self._lock:
            if not own or params.effort == self.effort:
                self._live.append(live)
            if curve is not None:
                self._curves.append(curve)
                self._fresh += 1
                self._choose()
        return True

    @property
    def _tuning(self) -> bool:
        return bool(self._goal and self.rungs) and not self._chosen

    def _curve(self, sample: Sample, truth: _Truth) -> NDArray[np.float64]:
        """The recall of the query at each rung; 1 behind the first at which it is 1."""
        curve = np.ones(len(self.rungs))
        for place, rung in enumerate(self.rungs):
            found = sample.index.search(sample.query[None], replace(sample.params, effort=rung))
            curve[place] = truth.recall(found[0][0], found[1][0])
            if curve[place] == 1:
                break
        return curve

    def _choose(self) -> None:
        """The least effort whose mean recall is above the goal beyond doubt; the gauge goes on with its recall."""
        if len(self._curves) < LEAST or self._fresh < EACH:
            return
        self._fresh = 0
        curves = np.stack(self._curves)
        sure = curves.mean(axis=0) - _SURE * curves.std(axis=0) / math.sqrt(len(curves))
        enough = np.flatnonzero(sure >= self._goal)
        place = int(enough[0]) if len(enough) else int(np.argmax(sure))
        self._chosen = True
        if self.rungs[place] != (self.effort or self._usual):
            self.effort = self.rungs[place]
            self._live.clear()
            self._live.extend(curves[:, place].tolist())

    def _run(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # elsewhere the share of time is the only bound
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
        while not self._ended:
            begun = time.monotonic()
            try:
                found = self.step()
            except Exception:  # the next sample has its own chance
                log.exception("a search could not be repeated for the recall gauge")
                found = True
            if not found:
                self._arrived.clear()
                if not self._waiting:
                    self._arrived.wait()
                continue
            spent = time.monotonic() - begun
            self._rest(spent / (TUNING if self._tuning else BUSY) - spent)

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._ended and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))


class _Truth:
    """The k exact neighbours of one query; whatever is as near as the last of them counts as one."""

    def __init__(self, ids: NDArray[np.int64], distances: NDArray[np.float32], nearest_first: bool) -> None:
        known = ids >= 0
        self._ids = ids[known]
        self._last = distances[known][-1:]
        self._nearest_first = nearest_first

    def recall(self, ids: NDArray[np.int64], distances: NDArray[np.float32]) -> float:
        if not len(self._ids):
            return 1.0
        near = distances <= self._last if self._nearest_first else distances >= self._last
        hits = np.count_nonzero((ids >= 0) & (near | np.isin(ids, self._ids)))
        return min(1.0, hits / len(self._ids))


def _rungs(name: str, last: int) -> Sequence[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 ... up to `last`."""
    rungs, rung = [], _FIRST[name]
    while rung < last:
        rungs.append(rung)
        if rung * 3 // 2 < last and rung > 1 and rung * 3 % 2 == 0:
            rungs.append(rung * 3 // 2)
        rung *= 2
    return (*rungs, last)
