"""Model stages of a pipeline: a leader that schedules, a last stage that samples, STEPs through the hub."""

from dataclasses import dataclass
from typing import Any

from ralmq.schema.frame import RETURN, Prefix
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import (
    Active,
    Beat,
    Bye,
    Cancel,
    Credit,
    Error,
    Final,
    Form,
    Gone,
    Partial,
    Release,
    Request,
    Return,
    Row,
    Span,
    Start,
    Step,
)
from simulation.invariants import holds
from simulation.nodes import Key, Link
from simulation.world import World

IN_FLIGHT = 2  # micro-batches


@dataclass(eq=False)
class Sequence:
    """A request at the leader."""

    body: dict[str, Any]
    until: int
    position: int = 0
    in_flight: bool = False
    started: bool = False


class Stage(Link):
    """One span of the model `m`. Its place is told by FORM; without one it is a spare."""

    def __init__(self, world: World, name: str, span: tuple[int, int], layers: int, idempotent: bool) -> None:
        self.pipeline = NO_ID
        self.form = Form("m", 0, 1, 0, 0)
        self.sequences: dict[Key, Sequence] = {}  # at the leader
        self.rows: dict[Key, dict[str, Any]] = {}  # at the last stage: the parameters of each sequence
        self.parked: dict[Key, int] = {}
        self.batch = 0
        self.seen: set[int] = set()  # batches that have come here
        self.back: set[int] = set()  # batches that have come back to the leader
        self.in_flight = 0
        self.free_at = 0.0
        self.hangs = False
        self.progress = 0
        offer = Span("m", "f", *span, layers, kv_blocks=10 + span[0], max_rows=8, context=100)
        super().__init__(world, name, span=offer, capacity=3, idempotent=idempotent)

    def beat(self) -> Beat:
        active = tuple(Active(*key) for key in [*self.sequences, *self.rows][:128])
        busy = len(self.sequences) + len(self.rows)
        self.progress += not self.hangs
        return Beat(self.progress, busy, active)

    def drain(self) -> None:
        self.send(Bye())

    def void(self, anew: bool) -> None:
        self._reset(NO_ID)
        self.hangs = False

    def take(self, prefix: Prefix, message: Any) -> None:
        key = (prefix.id, prefix.attempt)
        if isinstance(message, Form):
            if prefix.id != self.pipeline:
                holds(self.pipeline == NO_ID, f"{self.name}: FORM while it is in a pipeline")
                self._reset(prefix.id)
                self.form = message
        elif isinstance(message, Step):
            holds(prefix.id == self.pipeline, f"{self.name} got a STEP of another pipeline")
            self._step(prefix, message)
        elif isinstance(message, Gone) and prefix.id == self.pipeline:
            self._reset(NO_ID)
        elif isinstance(message, Request):
            self._accept(key, message)
        elif isinstance(message, Cancel | Release):
            if self.sequences.pop(key, None) is not None:
                self.send(Error("cancelled"), *key)
        elif isinstance(message, Gone):
            self.sequences.pop(key, None)
            self.rows.pop(key, None)
        elif isinstance(message, Credit):
            if (sequence := self.sequences.get(key)) is not None:
                sequence.until = max(sequence.until, message.until)
                self._schedule()
        elif isinstance(message, Bye):
            self.left = True
        else:
            super().take(prefix, message)

    # -- inside

    def _reset(self, pipeline: bytes) -> None:
        self.pipeline = pipeline
        self.sequences.clear()
        self.rows.clear()
        self.parked.clear()
        self.batch = self.in_flight = 0
        self.seen.clear()
        self.back.clear()

    @property
    def _last(self) -> bool:
        return self.form.place == self.form.stages - 1

    def _accept(self, key: Key, message: Request) -> None:
        holds(self.pipeline != NO_ID and self.form.place == 0, f"{self.name} got a request, and leads no pipeline")
        if key not in self.sequences:
            self.sequences[key] = Sequence(message.body, message.window)
            if not self.hello.idempotent:
                holds(key[1] == 0, f"{self.name} got a request that was sent again")
            self._schedule()

    def _schedule(self) -> None:
        """A micro-batch of all sequences that may go on and are not in flight."""
        if self.hangs:
            self.world.later(self, 0.5, self._schedule)
            return
        ready = {
            key: sequence
            for key, sequence in self.sequences.items()
            if not sequence.in_flight and (not sequence.until or sequence.position < sequence.until)
        }
        if not ready or self.in_flight >= IN_FLIGHT:
            return
        rows: list[Row] = []
        starts: list[Start] = []
        for key, sequence in ready.items():
            if not sequence.started:
                starts.append(Start(len(rows), 1, sequence.body))
            sequence.started = sequence.in_flight = True
            rows.append(Row(*key, sequence.position, 1, ()))
        self.batch += 1
        self.in_flight += 1
        self._compute(Step(tuple(rows), tuple(starts), batch=self.batch))

    def _step(self, prefix: Prefix, step: Step) -> None:
        if prefix.flags & RETURN:
            self._returned(step)
        elif step.batch not in self.seen:  # else it came twice
            self.seen.add(step.batch)
            self._compute(step)

    def _compute(self, step: Step) -> None:
        """Takes its time, one STEP after the other; then hands on, or samples."""
        pipeline = self.pipeline
        self.free_at = max(self.free_at, self.world.now) + self.world.rng.uniform(0.002, 0.02)
        self.world.later(self, self.free_at - self.world.now, lambda: self._computed(pipeline, step))

    def _computed(self, pipeline: bytes, step: Step) -> None:
        if pipeline != self.pipeline:
            return
        if self.hangs:
            self.world.later(self, 0.5, lambda: self._computed(pipeline, step))
            return
        if not self._last:
            self.send(step, pipeline)
            return
        for start in step.starts:
            row = step.rows[start.row]
            self.rows[row.id, row.attempt] = start.params
        now: list[Row] = []
        for row in step.rows:
            params = self.rows.get((row.id, row.attempt))
            if params is not None and row.position % 3 == 2:
                self._retrieve(row)
            else:
                now.append(row)
        self._sample(now, step.batch, True)

    def _retrieve(self, row: Row) -> None:
        """Parks a row until its neighbours come; the rest of the batch goes on."""
        key, pipeline = (row.id, row.attempt), self.pipeline
        self.parked[key] = row.position

        def come(how: str) -> None:
            if self.pipeline == pipeline and self.parked.pop(key, -1) == row.position:
                if how == "final":
                    self._sample([row], 0, False)
                elif key in self.rows:
                    del self.rows[key]
                    self.send(Error("worker_failed", f"the index ended with {how}"), *key)
                    self._return([Return(*key, -1, True)], 0, False)

        self.ask("echo", parent=row.id, then=come)

    def _sample(self, rows: list[Row], batch: int, whole: bool) -> None:
        returns: list[Return] = []
        for row in rows:
            key = (row.id, row.attempt)
            params = self.rows.get(key)
            if params is None:
                returns.append(Return(*key, -1, True))
                continue
            done = row.position + 1 == params["parts"]
            self.send(Partial({"mark": params["mark"], "place": row.position}), *key, sequence=row.position)
            if done:
                del self.rows[key]
                self.send(Final({"mark": params["mark"], "parts": params["parts"]}), *key)
            returns.append(Return(*key, row.position, done))
        self._return(returns, batch, whole)

    def _return(self, returns: list[Return], batch: int, whole: bool) -> None:
        """The way back; `whole` frees a place for another micro-batch."""
        step = Step(returns=tuple(returns), batch=batch if whole else 0)
        if self.form.place == 0:
            self._returned(step)
        else:
            self.send(step, self.pipeline, flags=RETURN)

    def _returned(self, step: Step) -> None:
        if step.batch:
            if step.batch in self.back:
                return  # it came twice
            self.back.add(step.batch)
            self.in_flight -= 1
        for back in step.returns:
            sequence = self.sequences.get((back.id, back.attempt))
            if sequence is None:
                continue
            if back.done:
                del self.sequences[back.id, back.attempt]
            elif back.token == sequence.position:
                sequence.position += 1
                sequence.in_flight = False
        self._schedule()
