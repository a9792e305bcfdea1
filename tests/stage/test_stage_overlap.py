"""Decoding beside retrieval: the leader's schedule in simulated time, over stages and an index that take theirs."""

import heapq
import random
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from ralmq.schema.message import Return
from ralmq.workers.stage.batch import Batch, Key, Sequence
from ralmq.workers.stage.leader import Leader

DECODE, SEARCH = 20.0, 20.0  # of a token in all stages together, and of a retrieval


@dataclass
class Timed:
    """A pipeline whose micro-batches take `step` in each stage, and `row` more for each row; in milliseconds.

    Every `interval`-th token of a sequence asks an index, which takes `search`, give or take `jitter` as a share; the
    sequence `lost` is never answered.
    """

    stages: int
    step: float
    row: float
    search: float
    jitter: float = 0.0
    interval: int = 1
    max_rows: int = 64
    now: float = 0.0
    lost: bytes = b""
    made: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leader = Leader(self.stages, 10_000, self.max_rows)
        self._random = random.Random(1)
        self._events: list[tuple[float, int, Any]] = []
        self._order = count()
        self._free = [0.0] * self.stages
        self._tokens: dict[Key, int] = {}

    def rate(self, sequences: int, tokens: int = 4000, apart: float = 0.0) -> float:
        """Tokens a second once it runs; prompts come all at once, or a random time of up to `apart` after another."""
        at = 0.0
        for number in range(sequences):
            self._after(at, "_come", number)
            at += apart * self._random.random()
        while len(self.made) < tokens:
            self.now, _, (kind, *what) = heapq.heappop(self._events)
            getattr(self, kind)(*what)
        begin = tokens // 4
        return 1000 * (tokens - 1 - begin) / (self.made[tokens - 1] - self.made[begin])

    def _come(self, number: int) -> None:
        key = (number.to_bytes(16, "big"), 0)
        self._tokens[key] = 0
        self.leader.add(Sequence(*key, [number], {}, 100_000, lambda: 0, lambda: None))
        self._drive()

    def _drive(self) -> None:
        while (batch := self.leader.next()) is not None:
            self._enter(batch, 0)

    def _after(self, delay: float, kind: str, *what: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), (kind, *what)))

    def _enter(self, batch: Batch, place: int) -> None:
        """Stages serve in order, one micro-batch at a time."""
        self._free[place] = max(self._free[place], self.now) + self.step + self.row * len(batch.rows)
        self._after(self._free[place] - self.now, "_left", batch, place)

    def _left(self, batch: Batch, place: int) -> None:
        if place + 1 < self.stages:
            self._enter(batch, place + 1)
            return
        keys = [(row.id, row.attempt) for row in batch.rows]
        asking = [key for key in keys if not self._tokens[key] % self.interval]
        heard = [key for key in asking if key[0] != self.lost]
        if heard:
            spread = 1 + self.jitter * self._random.uniform(-1, 1)
            self._after(self.search * spread, "_found", heard)
        self._back(batch.number, [key for key in keys if key not in asking])

    def _found(self, keys: list[Key]) -> None:
        self._back(0, keys)

    def _back(self, number: int, keys: list[Key]) -> None:
        for key in keys:
            self._tokens[key] += 1
            self.made.append(self.now)
        self.leader.returned(number, [Return(*key, 5, False) for key in keys], self.now / 1000)
        self._drive()


def timed(stages: int, rows: bool, **options: Any) -> Timed:
    """A token takes DECODE; either a micro-batch does, or each of its rows."""
    each = DECODE / stages
    return Timed(stages, 0.0 if rows else each, each if rows else 0.0, **{"search": SEARCH, **options})


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("stages", "sequences", "jitter", "bound"),
    [(1, 2, 0.0, 1.95), (1, 3, 0.5, 1.9), (1, 4, 0.5, 1.9), (3, 6, 0.0, 5.8)],
)
def test_retrieval_is_hidden_behind_the_others(
    rows: bool, stages: int, sequences: int, jitter: float, bound: float
) -> None:
    """Times the tokens of one sequence alone, whether or not rows are computed faster together."""
    alone = timed(stages, rows, jitter=jitter).rate(1)
    assert alone == pytest.approx(1000 / (DECODE + SEARCH), rel=0.02)
    assert timed(stages, rows, jitter=jitter).rate(sequences) >= bound * alone


@pytest.mark.parametrize("max_rows", [1, 4])
def test_full_micro_batches_are_groups_by_themselves(max_rows: int) -> None:
    """Tik-tok: two groups of as many rows as a micro-batch holds."""
    alone = timed(1, False, max_rows=max_rows).rate(max_rows)
    assert timed(1, False, max_rows=max_rows).rate(2 * max_rows) >= 1.95 * alone


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("sequences", [4, 8, 16])
@pytest.mark.parametrize("search", [20.0, 60.0])
def test_where_rows_cost_nothing_little_is_lost(stages: int, sequences: int, search: float) -> None:
    """Of the most that any schedule reaches: a token of each sequence in the time that it takes alone."""
    found = timed(stages, False, search=search, jitter=0.3).rate(sequences, apart=60.0)
    assert found >= 0.85 * 1000 * sequences / (DECODE + search)


@pytest.mark.parametrize("sequences", [4, 8])
def test_a_search_that_never_ends_stops_nobody(sequences: int) -> None:
    """One sequence waits for ever; the others have all stages for themselves."""
    pipe = timed(1, True, search=5.0)
    pipe.lost = (0).to_bytes(16, "big")
    assert pipe.rate(sequences) >= 0.9 * timed(1, True, search=5.0).rate(sequences - 1)


def test_without_retrieval_groups_are_even() -> None:
    pipe = timed(2, False, search=0.0, interval=1 << 30)
    pipe.rate(5, 1000)
    assert pipe.leader._away == 0.0 and pipe.leader._group(5) == 3
