"""The schedule of a pipeline, held by its first stage: which rows go into which STEP, and who waits for whom.

Pure bookkeeping: knows no tensor and no socket; time is what it is told.
"""

from bisect import insort
from collections.abc import Iterable
from math import ceil, inf

from ...schema.errors import Refused
from ...schema.message import Active, Return, Row, Start
from ..engine.pool import BLOCK
from .batch import SCORED, Batch, Key, Phase, Sequence, blocks_for
from .memory import Memory

CHUNK = 256  # tokens of prompts in one micro-batch
REMEMBERED = 64  # rounds after which what was measured counts half
PARAMETERS = 256 << 10  # bytes of parameters of new sequences in one micro-batch, but for a single one

Flight = list[tuple[Sequence, int, int]]  # a micro-batch under way: its sequences, from and up to where of each


class Leader:
    """The only scheduler of a pipeline.

    Continuous batching over stages: each micro-batch takes about (sequences / stages) next tokens, so that every stage
    has one, and beside them a chunk of prompts, so that a long prompt delays nobody by more than a chunk (chunked
    prefill: Agrawal et al. 2024, "Sarathi-Serve"). Sequences that wait for neighbours are in no stage: the share of
    their time that they do is left out of that number, so that while one group retrieves, others keep every stage busy.
    Where KV blocks run out the least urgent sequence gives its own back and is computed anew later; nothing is refused
    or lost.

    Args:
        stages: of the pipeline.
        blocks: KV blocks that every stage has.
        max_rows: of a micro-batch.
        chunk: tokens of prompts in one micro-batch.

    Attributes:
        preempted: how often a sequence gave its blocks back.
        prefilled: tokens of prompts that were computed.
    """

    def __init__(self, stages: int, blocks: int, max_rows: int, chunk: int = CHUNK) -> None:
        self.preempted = 0
        self.prefilled = 0
        self.memory = Memory(blocks)
        self._stages = stages
        self._max_rows = max_rows
        self._chunk = chunk
        self._sequences: dict[Key, Sequence] = {}
        self._waiting: list[Sequence] = []  # these two in the order of their turn
        self._prefill: list[Sequence] = []
        self._ready: list[Sequence] = []  # in the order in which they became so, by priority
        self._flights: dict[int, Flight] = {}
        self._chunks: set[int] = set()  # the flights that hold prompts
        self._over: list[Active] = []
        self._number = 0
        self._count = 0
        self._stamp = 0
        self._away = 0.0  # seconds that sequences waited for neighbours, of so many in all; and up to when
        self._whole = 0.0
        self._measured = (0.0, 0, 0)  # with how many of them do since then, of how many
        self._rounds = 0

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def flying(self) -> int:
        """Micro-batches under way."""
        return len(self._flights)

    @property
    def working(self) -> bool:
        """Some sequence waits for the pipeline, not for its reader."""
        return any(sequence.phase is not Phase.PAUSED for sequence in self._sequences.values())

    @property
    def gauges(self) -> dict[str, int]:
        """What `status` shows of it."""
        memory = self.memory
        return {
            "sequences": len(self._sequences),
            "waiting": len(self._waiting),
            "kv_blocks": memory.blocks,
            "free_blocks": memory.available,
            "cached_blocks": memory.cached,
            "peak_blocks": memory.peak,
            "prefilled_tokens": self.prefilled,
            "reused_tokens": memory.reused,
            "preempted": self.preempted,
        }

    def add(self, sequence: Sequence) -> None:
        """Takes a request; among equals of priority the first to come is served first.

        Raises:
            Refused: it needs more blocks than there are.
        """
        needed, there = blocks_for(sequence.need), self.memory.blocks
        if needed > there:
            raise Refused(
                f"prompt and max_tokens need {needed} KV blocks of {BLOCK} tokens, the pipeline has {there}: "
                "ask for fewer tokens, or start the stages with more kv_mib"
            )
        self._count += 1
        sequence.order = self._count
        sequence.length = len(sequence.tokens)
        self._sequences[sequence.key] = sequence
        insort(self._waiting, sequence, key=_turn)

    def cancel(self, key: Key) -> None:
        """Stops a sequence; its blocks are free once the last STEP that names them has come back."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.over:
            return
        sequence.over = True
        if sequence.started:
            self._over.append(Active(*key))  # the last stage forgets it, and what it has parked
        self._unlist(sequence)
        if not sequence.flying:
            self._end(sequence)

    def granted(self, key: Key) -> None:
        """The reader of a sequence takes more."""
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.phase is Phase.PAUSED:
            self._settle(sequence)

    def next(self) -> Batch | None:
        """The next micro-batch, or None where nothing is to be sent now; at most two a stage are under way."""
        over, self._over = self._over, []
        flight = self._board() if self.flying < 2 * self._stages else []
        if flight:
            return self._batch(flight, over)
        return Batch(0, [], [], over, [], []) if over else None

    def returned(self, number: int, returns: Iterable[Return], now: float = 0.0) -> None:
        """The last stage is done with rows; `number` > 0 says that a micro-batch has left the pipeline.

        Args:
            now: seconds, from any beginning.
        """
        flight = self._flights.pop(number, [])
        self._chunks.discard(number)
        for sequence, _, _ in flight:
            sequence.flying -= 1
        failed: set[Key] = set()
        ended: list[Sequence] = []
        for row in returns:
            known = self._sequences.get((row.id, row.attempt))
            if known is None:
                continue
            if row.token < 0:
                failed.add(known.key)
            if row.done:
                ended.append(known)
            elif known.phase is Phase.AWAITED and not known.over:
                known.tokens.append(row.token)
                self._settle(known)
        for sequence, _, end in flight:
            if sequence.key not in failed and not sequence.over:
                self.memory.complete(sequence, end)
        for sequence in ended:
            sequence.over = True
            self._unlist(sequence)
        for sequence in (*ended, *[sequence for sequence, _, _ in flight]):
            if sequence.over and not sequence.flying:
                self._end(sequence)
        self._measure(now)

    def abandon(self) -> None:
        """The pipeline is over: every sequence ends."""
        for sequence in list(self._sequences.values()):
            self._end(sequence)

    # -- who goes next

    def _board(self) -> Flight:
        """Rows of the next micro-batch.

        Next tokens wait for more of their like where every stage has work: fuller micro-batches, and fewer. Beside
        sequences that await their next token, chunks go one a stage at a time: with more the next tokens would queue.
        """
        self._admit()
        decoding = sum(sequence.phase in _DECODING for sequence in self._sequences.values())
        wanted = min(self._max_rows, self._group(decoding))
        prompts = bool(self._prefill) and (not decoding or len(self._chunks) < self._stages)
        if not prompts and len(self._ready) < wanted and self.flying >= self._stages:
            return []
        flight: Flight = []
        wanted = min(wanted, self._max_rows - prompts)
        for sequence in self._ready[:]:
            if len(flight) == wanted:
                break
            if sequence.phase is Phase.READY and self._grow(sequence):
                self._ready.remove(sequence)
                flight.append(self._fly(sequence, 1))
        if prompts:
            flight += self._prompts(len(flight))
        return flight

    def _group(self, decoding: int) -> int:
        """Next tokens of one micro-batch, of so many sequences: those that are in no stage are left out."""
        if not self._away or self._rounds < REMEMBERED:
            return max(1, -(-decoding // self._stages))
        share = decoding * (1.0 - self._away / self._whole) / self._stages
        return 1 if share < 1.5 else ceil(share)

    def _measure(self, now: float) -> None:
        """Which share of their time sequences wait for neighbours, of late."""
        since, away, whole = self._measured
        self._away += away * (now - since)
        self._whole += whole * (now - since)
        self._rounds += 1
        if not self._rounds % REMEMBERED:
            self._away, self._whole = self._away / 2, self._whole / 2
        decoding = [sequence for sequence in self._sequences.values() if sequence.phase in _DECODING]
        parked = sum(sequence.phase is Phase.AWAITED and not sequence.flying for sequence in decoding)
        self._measured = now, parked, len(decoding)

    def _prompts(self, rows: int) -> Flight:
        """A chunk beside so many next tokens."""
        flight: Flight = []
        room, left = max(1, self._chunk - rows), PARAMETERS
        for sequence in self._prefill[:]:
            if not room or rows + len(flight) >= self._max_rows:
                break
            if not sequence.started:
                left -= sequence.size
                if left < 0 and flight:
                    break
            count = min(room, sequence.known - sequence.computed, SCORED if sequence.scored else room)
            room -= count
            self.prefilled += count
            flight.append(self._fly(sequence, count))
            if sequence.phase is not Phase.PREFILL:
                self._prefill.remove(sequence)
        return flight

    def _fly(self, sequence: Sequence, count: int) -> tuple[Sequence, int, int]:
        begin = sequence.computed
        sequence.computed += count
        sequence.flying += 1
        if sequence.computed == sequence.known:
            sequence.phase = Phase.AWAITED
        if sequence.scored and sequence.computed > sequence.flown:
            sequence.parts += 1  # the last stage does not send again what it has sent
            until = sequence.until()
            if until and sequence.parts >= until and sequence.phase is Phase.PREFILL:
                sequence.phase = Phase.PAUSED
        sequence.flown = max(sequence.flown, sequence.computed)
        return sequence, begin, sequence.computed

    def _batch(self, flight: Flight, over: list[Active]) -> Batch:
        self._number += 1
        self._flights[self._number] = flight
        if any(end - begin > 1 or not sequence.started for sequence, begin, end in flight):
            self._chunks.add(self._number)
        batch = Batch(self._number, [], [], over, [], [])
        for place, (sequence, begin, end) in enumerate(flight):
            blocks = tuple(sequence.blocks[: blocks_for(end)])
            batch.rows.append(Row(sequence.id, sequence.attempt, begin, end - begin, blocks))
            batch.ids += sequence.tokens[begin:end]
            if sequence.cross:
                batch.cross.append(sequence.cross)
                if begin < sequence.cross:
                    batch.states.append(sequence.states[begin:end])
            if not sequence.started:
                sequence.started = True
                batch.starts.append(Start(place, sequence.length, sequence.params))
                batch.prompts += sequence.tokens[: sequence.length]
        return batch

    # -- who has blocks

    def _admit(self) -> None:
        """Blocks for who waits, in turn; nobody overtakes but those that another one's prefill will soon serve."""
        for sequence in self._waiting[:]:
            if self.memory.worth_waiting(sequence):
                continue
            holders = sum(bool(other.blocks) for other in self._sequences.values())
            reserve = min(holders, self.memory.blocks // 8)  # each of them will need a block soon
            while not self.memory.admit(sequence, reserve):
                if not self._make_room((-sequence.priority, inf)):
                    return
            self._waiting.remove(sequence)
            sequence.phase = Phase.PREFILL
            insort(self._prefill, sequence, key=_turn)

    def _grow(self, sequence: Sequence) -> bool:
        """A block for its next token. Who comes later in turn gives way; where nobody can, it waits until one does, or
        gives way itself to one before it. The first in turn always gets on."""
        while not self.memory.grow(sequence):
            if not self._make_room(sequence.turn):
                return False
        return True

    def _make_room(self, turn: tuple[int, float]) -> bool:
        """Takes the blocks of the last in turn of those behind `turn`, slow readers first; at last, where only slow
        readers are left, those of one before it, who may pause for as long as they like. False where nobody can give
        way now."""
        holders = [s for s in self._sequences.values() if s.blocks]
        found = [s for s in holders if s.turn > turn]
        if not found and all(s.phase is Phase.PAUSED or s.turn == turn for s in holders):
            found = [s for s in holders if s.turn != turn]
        idle = [s for s in found if not s.flying]
        if not idle:
            return False
        self._preempt(max([s for s in idle if s.phase is Phase.PAUSED] or idle, key=_turn))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Its tokens are computed anew later; the last stage keeps what it knows of it."""
        self.preempted += 1
        self._unlist(sequence)
        self.memory.drop(sequence)
        if sequence.phase in (Phase.PREFILL, Phase.READY):
            self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        insort(self._waiting, sequence, key=_turn)

    def _settle(self, sequence: Sequence) -> None:
        """PAUSED where the reader has not taken enough, else on to the next token."""
        until = sequence.until()
        sent = sequence.parts if sequence.scored else len(sequence.tokens) - sequence.length
        if until and sent >= until:
            sequence.phase = Phase.PAUSED
        elif not sequence.blocks:
            self._wait(sequence)
        elif sequence.known - sequence.computed > 1 or sequence.scored:
            sequence.phase = Phase.PREFILL
            insort(self._prefill, sequence, key=_turn)
        else:
            self._stamp += 1
            sequence.stamp = self._stamp
            sequence.phase = Phase.READY
            insort(self._ready, sequence, key=lambda ready: (-ready.priority, ready.stamp))

    def _unlist(self, sequence: Sequence) -> None:
        for line in (self._waiting, self._prefill, self._ready):
            if sequence in line:
                line.remove(sequence)

    def _end(self, sequence: Sequence) -> None:
        if self._sequences.pop(sequence.key, None) is None:
            return
        self._unlist(sequence)
        sequence.phase = Phase.ENDED
        self.memory.drop(sequence)
        sequence.ended()


_DECODING = (Phase.READY, Phase.AWAITED)


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn
