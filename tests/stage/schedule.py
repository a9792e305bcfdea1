"""Stages without models: micro-batches walk queues at random speed, past a table of what each KV slot holds.

Knows the rules that a schedule must keep, and breaks off where one is broken.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from ralmq.schema.message import Active, Return, Row
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.stage.batch import SCORED, Batch, Key, Phase, Sequence
from ralmq.workers.stage.leader import Leader


@dataclass(eq=False)
class Asked:
    """A sequence as its asker sees it: how many tokens it wants, has, and takes; whether it gave up; ends seen."""

    sequence: Sequence
    wants: int
    takes: int
    has: int = 0
    gave_up: bool = False
    failed: bool = False
    ends: int = 0


@dataclass
class Known:
    """A sequence at the last stage: tokens that it has, the first `length` of them the prompt."""

    total: int
    wants: int
    scored: bool
    made: int = 0
    scored_to: int = 0
    parked: bool = False


@dataclass
class Pipe:
    """A leader, and `stages` stages that compute nothing.

    Attributes:
        failures: chance that a stage fails with a micro-batch.
        order: keys in the order of their first rows.
        parks: chance that a row waits for neighbours.
        batches: of each micro-batch, how many next tokens and how many tokens of prompts.
        riders: its sequences; `starts`: how many of them are new.
        computed: tokens that went through the stages, of each sequence.
    """

    seed: int
    stages: int
    blocks: int
    max_rows: int
    failures: float = 0.0
    chunk: int = 256
    parks: float = 0.3
    asked: dict[Key, Asked] = field(default_factory=dict)
    order: list[Key] = field(default_factory=list)
    batches: list[tuple[int, int]] = field(default_factory=list)
    riders: list[list[Key]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    computed: Counter[Key] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.leader = Leader(self.stages, self.blocks, self.max_rows, self.chunk)
        self._queues: list[deque[Batch]] = [deque() for _ in range(self.stages)]
        self._way_back: deque[tuple[int, tuple[Return, ...]]] = deque()
        self._slots: list[dict[int, tuple[int, ...]]] = [{} for _ in range(self.stages)]
        self._known: dict[Key, Known] = {}
        self._count = 0
        self._reached: dict[Key, int] = {}

    # -- what happens from outside

    def add(
        self,
        prompt: int | list[int],
        wants: int,
        takes: int = 0,
        score: bool = False,
        priority: int = 4,
    ) -> Asked:
        """A request with a prompt (of so many tokens of its own) for `wants` new tokens (none where it is a score)."""
        self._count += 1
        key = (self._count.to_bytes(16, "big"), 0)
        tokens = prompt if isinstance(prompt, list) else [1000 * self._count + place for place in range(prompt)]
        params: dict[str, Any] = {"feed": len(tokens) - 1} if score else {}
        need = len(tokens) - 1 if score else len(tokens) + wants - 1
        asked = Asked(None, 0 if score else wants, takes)  # type: ignore[arg-type]

        def ended() -> None:
            asked.ends += 1

        own = len(tokens) if score else 1
        asked.sequence = Sequence(*key, list(tokens), params, need, lambda: asked.takes, ended, priority, own)
        self.asked[key] = asked
        self.leader.add(asked.sequence)
        self.drive()
        return asked

    def cancel(self, asked: Asked) -> None:
        asked.gave_up = True
        self.leader.cancel(asked.sequence.key)
        self.drive()

    def grant(self, asked: Asked, more: int) -> None:
        asked.takes += more
        self.leader.granted(asked.sequence.key)
        self.drive()

    def finish(self, most: int = 200_000) -> None:
        """Moves until nothing is left; readers read on."""
        for _ in range(most):
            if not len(self.leader) and self.idle:
                return
            for asked in self.asked.values():
                if asked.takes and asked.sequence.phase is Phase.PAUSED:
                    self.grant(asked, 16)
            self.move()
        raise AssertionError("it never ends")

    # -- what happens inside

    @property
    def idle(self) -> bool:
        return not any(self._queues) and not self._way_back and not any(k.parked for k in self._known.values())

    @property
    def held(self) -> int:
        """Sequences that the last stage knows."""
        return len(self._known)

    @property
    def free(self) -> int:
        return self.leader.memory.available

    def drive(self) -> None:
        """As the link's side does after each event."""
        while True:
            batch = self.leader.next()
            self.check()
            if batch is None:
                return
            assert bool(batch.number) == bool(batch.rows), "a number stands for rows"
            if batch.rows:
                self._check_batch(batch)
            self._queues[0].append(batch)

    def move(self) -> None:
        """One random thing: a stage computes its next STEP, a RETURN arrives, or neighbours come."""
        choices: list[Any] = [place for place, queue in enumerate(self._queues) if queue]
        choices += ["back"] if self._way_back else []
        choices += ["neighbours"] if any(known.parked for known in self._known.values()) else []
        if not choices:
            return
        chosen = self.random.choice(choices)
        if chosen == "back":
            self.leader.returned(*self._way_back.popleft())
            self.drive()
        elif chosen == "neighbours":
            key = self.random.choice([key for key, known in self._known.items() if known.parked])
            self._known[key].parked = False
            self._back(0, [self._sampled(key)])
        else:
            self._compute(chosen)

    def _compute(self, place: int) -> None:
        batch = self._queues[place].popleft()
        if batch.rows and self.random.random() < self.failures:
            keys = [(row.id, row.attempt) for row in batch.rows]
            for key in keys:
                self.asked[key].failed = True
            ended = [*batch.ended, *[Active(*key) for key in keys]]
            batch = Batch(batch.number, [], [], ended, [], [])
        for row in batch.rows:
            self._write(place, row)
        if place + 1 < self.stages:
            self._queues[place + 1].append(batch)
        else:
            self._last(batch)

    def _write(self, place: int, row: Row) -> None:
        """The cache of one stage: what the row reads must be there, computed for exactly these tokens."""
        asked, slots = self.asked[row.id, row.attempt], self._slots[place]
        if asked.failed:
            return
        end = row.position + row.length
        tokens = tuple(asked.sequence.tokens[:end])
        assert row.length > 0 and len(row.blocks) == -(-end // BLOCK), "blocks cover the row, and no more"
        for position in range(end):
            slot = row.blocks[position // BLOCK] * BLOCK + position % BLOCK
            holds = tokens[max(0, position - 40) : position + 1]
            if position >= row.position:
                slots[slot] = holds
            assert slots.get(slot) == holds, "it reads what was computed for other tokens"
        if place == 0:
            self.computed[row.id, row.attempt] += row.length

    def _last(self, batch: Batch) -> None:
        returns: list[Return] = []
        for start in batch.starts:
            row = batch.rows[start.row]
            key = (row.id, row.attempt)
            feed = start.params.get("feed")
            self._known[key] = Known(feed or start.length, self.asked[key].wants, feed is not None)
        for row in batch.rows:
            key = (row.id, row.attempt)
            known = self._known.get(key)
            if known is None:
                returns.append(Return(*key, -1, True))
                continue
            asked = self.asked[key]
            end = row.position + row.length
            if known.scored and end > known.scored_to:  # what was sent before is not sent again
                asked.has += 1
                known.scored_to = end
                assert row.length <= SCORED and (not asked.takes or asked.has <= asked.takes), "more than is taken"
            if row.position + row.length == known.total:
                if not known.scored and self.random.random() < self.parks:
                    known.parked = True
                else:
                    returns.append(self._sampled(key))
        for over in batch.ended:
            self._known.pop((over.id, over.attempt), None)
            returns.append(Return(over.id, over.attempt, -1, True))
        if batch.number or returns:
            self._back(batch.number, returns)

    def _sampled(self, key: Key) -> Return:
        known, asked = self._known[key], self.asked[key]
        if known.scored:
            del self._known[key]
            return Return(*key, -1, True)
        known.made += 1
        known.total += 1
        asked.has += 1
        assert not asked.takes or asked.has <= asked.takes, "more tokens than the reader takes"
        done = known.made == known.wants
        if done:
            del self._known[key]
        return Return(*key, known.made, done)

    def _back(self, number: int, returns: list[Return]) -> None:
        self._way_back.append((number, tuple(returns)))

    # -- the rules

    def check(self) -> None:
        """Blocks are counted right; so are flights; a row on its way still holds its blocks."""
        leader = self.leader
        pool = leader.memory._pool
        holders = Counter(block for sequence in leader._sequences.values() for block in sequence.blocks)
        assert [holders[block] for block in range(self.blocks)] == pool._holders, "holders are counted wrong"
        assert self.free == self.blocks - len(holders), "a block leaked"
        assert len(pool._named) == sum(key is not None for key in pool._keys)
        flying = [batch for queue in self._queues for batch in queue if batch.number]
        numbers = {batch.number for batch in flying} | {number for number, _ in self._way_back if number}
        assert len(set(leader._flights) ^ numbers) <= 1, "micro-batches are counted wrong"  # 1: just made
        assert leader.flying <= 2 * self.stages, "too many micro-batches under way"
        for batch in flying:
            for row in batch.rows:
                sequence = leader._sequences.get((row.id, row.attempt))
                assert sequence is not None and set(row.blocks) <= set(sequence.blocks), "its blocks are given away"

    def _check_batch(self, batch: Batch) -> None:
        keys = [(row.id, row.attempt) for row in batch.rows]
        assert len(set(keys)) == len(keys) <= self.max_rows
        assert len(batch.ids) == sum(row.length for row in batch.rows)
        assert len(batch.prompts) == sum(start.length for start in batch.starts)
        tokens = prompts = 0
        pool, begin = self.leader.memory._pool, 0
        fresh = {start.row for start in batch.starts}
        for place, (key, row) in enumerate(zip(keys, batch.rows, strict=True)):
            sequence = self.asked[key].sequence
            assert batch.ids[begin : begin + row.length] == sequence.tokens[row.position : row.position + row.length]
            begin += row.length
            assert row.position in (self._reached.get(key), 0) or place in fresh or not row.position % BLOCK
            self._reached[key] = row.position + row.length
            written = {row.blocks[p // BLOCK] for p in range(row.position, row.position + row.length)}
            assert all(pool._holders[block] == 1 for block in written), "it writes to a block of another sequence, too"
            one = row.length == 1 and place not in fresh
            tokens, prompts = tokens + one, prompts + (0 if one else row.length)
        assert prompts <= self.chunk
        self.batches.append((tokens, prompts))
        self.riders.append(keys)
        self.starts.append(len(batch.starts))
        self.order += [keys[start.row] for start in batch.starts]
