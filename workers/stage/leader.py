"""The schedule of a pipeline, held by its first stage: which rows go into which STEP, and who owns which KV blocks.

Pure bookkeeping: knows no tensor, no socket, no time.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ...schema.errors import Refused
from ...schema.message import Active, Return, Row, Start
from ..engine.pool import BLOCK, BlockPool

PREFILL = 1024  # tokens of prompts in one micro-batch; a single longer prompt is one of its own

Key = tuple[bytes, int]  # id and attempt of a request


class Phase(Enum):
    """Where a sequence is. FLYING: one row of it is on its way through the stages."""

    WAITING = "waiting for KV blocks"
    FRESH = "admitted, not computed"
    READY = "ready for its next token"
    PAUSED = "its reader is slow"
    FLYING = "in a micro-batch"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request of the pipeline.

    Attributes:
        tokens: the prompt, then what was sampled.
        length: tokens of the prompt.
        need: KV slots that it may use at most.
        until: new tokens that its reader takes (0 = no bound), asked anew each time.
        ended: called once, when no stage will write to its blocks any more.
    """

    id: bytes
    attempt: int
    tokens: list[int]
    params: dict[str, Any]
    need: int
    until: Callable[[], int]
    ended: Callable[[], None]
    length: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    cancelled: bool = False
    started: bool = False

    @property
    def key(self) -> Key:
        return self.id, self.attempt


@dataclass(slots=True)
class Batch:
    """One micro-batch: number (0: no rows), rows, parameters of new ones, ended sequences, ids of all rows."""

    number: int
    rows: list[Row]
    starts: list[Start]
    ended: list[Active]
    ids: list[int]
    prompts: list[int]


class Leader:
    """The only scheduler of a pipeline.

    Args:
        stages: of the pipeline.
        blocks: KV blocks that every stage has.
        max_rows: of a micro-batch.
    """

    def __init__(self, stages: int, blocks: int, max_rows: int) -> None:
        self.flying = 0
        self._stages = stages
        self._max_rows = max_rows
        self._capacity = blocks
        self._pool = BlockPool(blocks)
        self._sequences: dict[Key, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._fresh: deque[Sequence] = deque()
        self._ready: deque[Sequence] = deque()
        self._over: list[Active] = []
        self._number = 0
        self._prefilled = False

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def free_blocks(self) -> int:
        return self._pool.available

    def add(self, sequence: Sequence) -> None:
        """Takes a request; it is admitted in order of arrival, once blocks for all it may need are free.

        Raises:
            Refused: it needs more blocks than there are.
        """
        needed = blocks_for(sequence.need)
        if needed > self._capacity:
            raise Refused(
                f"prompt and max_tokens need {needed} KV blocks of {BLOCK} tokens, the pipeline has {self._capacity}: "
                "ask for fewer tokens, or start the stages with more kv_mib"
            )
        sequence.length = len(sequence.tokens)
        self._sequences[sequence.key] = sequence
        self._waiting.append(sequence)

    def cancel(self, key: Key) -> None:
        """Stops a sequence; its blocks are free once the last STEP that names them has come back."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.cancelled:
            return
        sequence.cancelled = True
        if sequence.started:
            self._over.append(Active(*key))  # the last stage forgets it, and returns what it has parked
        if sequence.phase is not Phase.FLYING:
            for line in (self._waiting, self._fresh, self._ready):
                if sequence in line:
                    line.remove(sequence)
            self._end(sequence)

    def granted(self, key: Key) -> None:
        """The reader of a sequence takes more."""
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.phase is Phase.PAUSED:
            self._settle(sequence)

    def next(self) -> Batch | None:
        """The next micro-batch, or None where nothing is to be sent now.

        Prompts and next tokens take turns, so that neither starves the other. At most two micro-batches a stage are
        under way. A micro-batch takes about (sequences / stages) rows: more would leave the other stages idle, and a
        smaller one is sent only where a stage would have nothing to do.
        """
        over, self._over = self._over, []
        rows: list[Sequence] = []
        if self.flying < 2 * self._stages:
            self._admit()
            if self._fresh and not (self._prefilled and self._ready):
                rows = self._prompts()
            if not rows:
                rows = self._tokens()
        if rows:
            self._prefilled = not rows[0].started
            return self._batch(rows, over)
        return Batch(0, [], [], over, [], []) if over else None

    def returned(self, number: int, returns: tuple[Return, ...]) -> None:
        """The last stage is done with rows; `number` > 0 says that a micro-batch has left the pipeline."""
        if number:
            self.flying -= 1
        for row in returns:
            sequence = self._sequences.get((row.id, row.attempt))
            if sequence is None or sequence.phase is not Phase.FLYING:
                continue
            if row.done or sequence.cancelled:
                self._end(sequence)
            else:
                sequence.tokens.append(row.token)
                self._settle(sequence)

    def abandon(self) -> None:
        """The pipeline is over: every sequence ends."""
        for sequence in list(self._sequences.values()):
            self._end(sequence)

    # -- inside

    def _admit(self) -> None:
        while self._waiting:
            blocks = self._pool.take(blocks_for(self._waiting[0].need))
            if blocks is None:
                return
            sequence = self._waiting.popleft()
            sequence.blocks = blocks
            sequence.phase = Phase.FRESH
            self._fresh.append(sequence)

    def _prompts(self) -> list[Sequence]:
        rows = [self._fresh.popleft()]
        tokens = rows[0].length
        while self._fresh and len(rows) < self._max_rows and tokens + self._fresh[0].length <= PREFILL:
            rows.append(self._fresh.popleft())
            tokens += rows[-1].length
        return rows

    def _tokens(self) -> list[Sequence]:
        active = sum(sequence.phase in _ACTIVE for sequence in self._sequences.values())
        wanted = min(self._max_rows, max(1, -(-active // self._stages)))
        if not self._ready or (len(self._ready) < wanted and self.flying >= self._stages):
            return []
        return [self._ready.popleft() for _ in range(min(wanted, len(self._ready)))]

    def _batch(self, sequences: list[Sequence], over: list[Active]) -> Batch:
        self._number += 1
        self.flying += 1
        batch = Batch(self._number, [], [], over, [], [])
        for place, sequence in enumerate(sequences):
            fed = sequence.tokens[sequence.computed : sequence.params.get("feed", len(sequence.tokens))]
            used = blocks_for(sequence.computed + len(fed))
            row = Row(sequence.id, sequence.attempt, sequence.computed, len(fed), tuple(sequence.blocks[:used]))
            batch.rows.append(row)
            batch.ids += fed
            if not sequence.started:
                sequence.started = True
                batch.starts.append(Start(place, sequence.length, sequence.params))
                batch.prompts += sequence.tokens
            sequence.computed += len(fed)
            sequence.phase = Phase.FLYING
        return batch

    def _settle(self, sequence: Sequence) -> None:
        """READY, or PAUSED where the reader has not taken enough."""
        until = sequence.until()
        if until and len(sequence.tokens) - sequence.length >= until:
            sequence.phase = Phase.PAUSED
        else:
            sequence.phase = Phase.READY
            self._ready.append(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.phase = Phase.ENDED
        del self._sequences[sequence.key]
        if sequence.blocks:
            self._pool.free(sequence.blocks)
        sequence.ended()


_ACTIVE = (Phase.FRESH, Phase.READY, Phase.FLYING)


def blocks_for(tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    return -(-tokens // BLOCK)
