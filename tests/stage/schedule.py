"""Stages without models: micro-batches walk queues at random speed, past a table of what each KV slot holds.

Knows the rules that a schedule must keep, and breaks off where one is broken.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ralmq.schema.message import Active, Return, Row
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.stage.leader import Batch, Key, Leader, Phase, Sequence


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
    """A sequence at the last stage."""

    wants: int
    made: int = 0
    parked: bool = False


@dataclass
class Pipe:
    """A leader, and `stages` stages that compute nothing."""

    seed: int
    stages: int
    blocks: int
    max_rows: int
    failures: float = 0.0  # chance that a stage fails with a micro-batch
    asked: dict[Key, Asked] = field(default_factory=dict)
    order: list[Key] = field(default_factory=list)  # of first rows
    prompts: list[int] = field(default_factory=list)  # rows of each micro-batch of prompts
    tokens: list[int] = field(default_factory=list)  # and of each of next tokens

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.leader = Leader(self.stages, self.blocks, self.max_rows)
        self._queues: list[deque[Batch]] = [deque() for _ in range(self.stages)]
        self._way_back: deque[tuple[int, tuple[Return, ...]]] = deque()
        self._slots: list[dict[int, tuple[Key, int]]] = [{} for _ in range(self.stages)]
        self._known: dict[Key, Known] = {}
        self._count = 0
        self._prompts_last = False

    # -- what happens from outside

    def add(self, prompt: int, wants: int, takes: int = 0, score: bool = False) -> Asked:
        """A request of `prompt` tokens for `wants` new ones (one row alone where it is a score)."""
        self._count += 1
        key = (self._count.to_bytes(16, "big"), 0)
        params: dict[str, Any] = {"feed": prompt - 1} if score else {}
        need = prompt - 1 if score else prompt + wants - 1
        asked = Asked(None, 0 if score else wants, takes)  # type: ignore[arg-type]

        def ended() -> None:
            asked.ends += 1

        asked.sequence = Sequence(*key, list(range(prompt)), params, need, lambda: asked.takes, ended)
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

    # -- what happens inside

    @property
    def idle(self) -> bool:
        return not any(self._queues) and not self._way_back and not any(k.parked for k in self._known.values())

    @property
    def held(self) -> int:
        """Sequences that the last stage knows."""
        return len(self._known)

    def drive(self) -> None:
        """As the link's side does after each event."""
        while True:
            fresh, ready = bool(self.leader._fresh), bool(self.leader._ready)
            batch = self.leader.next()
            self.check()
            if batch is None:
                return
            assert bool(batch.number) == bool(batch.rows), "a number stands for rows"
            if batch.rows:
                self._check_turn(batch, fresh, ready)
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
        """The cache of one stage: what the row reads must be its own, all of it."""
        key, slots = (row.id, row.attempt), self._slots[place]
        end = row.position + row.length
        assert row.length > 0 and len(row.blocks) == -(-end // BLOCK), "blocks cover the row, and no more"
        for position in range(end):
            slot = row.blocks[position // BLOCK] * BLOCK + position % BLOCK
            if position >= row.position:
                slots[slot] = key, position
            assert slots[slot] == (key, position), "another sequence wrote to a block in use"

    def _last(self, batch: Batch) -> None:
        returns: list[Return] = []
        for start in batch.starts:
            row = batch.rows[start.row]
            key = (row.id, row.attempt)
            self._known[key] = Known(self.asked[key].wants)
        for row in batch.rows:
            key = (row.id, row.attempt)
            known = self._known.get(key)
            if known is None:
                returns.append(Return(*key, -1, True))
            elif known.wants and self.random.random() < 0.3:
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
        if not known.wants:  # a score
            del self._known[key]
            return Return(*key, -1, True)
        known.made += 1
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
        """No block has two owners or none; flights are counted; a row on its way still owns its blocks."""
        leader = self.leader
        live = list(leader._sequences.values())
        owned = [block for sequence in live for block in sequence.blocks]
        assert len(owned) == len(set(owned)), "a block with two owners"
        assert len(owned) + leader.free_blocks == self.blocks, "a block leaked"
        flying = [batch for queue in self._queues for batch in queue]
        numbers = sum(bool(batch.number) for batch in flying) + sum(bool(number) for number, _ in self._way_back)
        assert leader.flying in (numbers, numbers + 1), "micro-batches are counted wrong"  # + 1: just made
        assert leader.flying <= 2 * self.stages, "too many micro-batches under way"
        for batch in flying:
            for row in batch.rows:
                sequence = leader._sequences[row.id, row.attempt]
                assert sequence.phase is Phase.FLYING and set(row.blocks) <= set(sequence.blocks)

    def _check_turn(self, batch: Batch, fresh: bool, ready: bool) -> None:
        assert len({(row.id, row.attempt) for row in batch.rows}) == len(batch.rows) <= self.max_rows
        assert len(batch.ids) == sum(row.length for row in batch.rows)
        prompts = bool(batch.starts)
        (self.prompts if prompts else self.tokens).append(len(batch.rows))
        assert not prompts or len(batch.starts) == len(batch.rows), "prompts and next tokens do not mix"
        if prompts:
            assert not (self._prompts_last and ready), "prompts twice in turn while tokens waited"
            assert len(batch.prompts) == sum(start.length for start in batch.starts)
            self.order += [(row.id, row.attempt) for row in batch.rows]
        else:
            assert self._prompts_last or not fresh, "tokens twice in turn while prompts waited"
            assert all(row.length == 1 for row in batch.rows), "a token is computed once"
        self._prompts_last = prompts
