"""What the last stage knows of each sequence: its parameters, what it waits for, what is sampled. Knows no socket.

All of it runs in the compute thread. Rows that wait for neighbours are parked with their logits; the others go on.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...schema.errors import RalmqError, WorkerFailed
from ...schema.message import Error, Final, Partial, Return, Row
from ..engine.rows import NO_LOGITS, log_probs_of, sample_rows, top_log_probs
from ..engine.span import Span
from ..hooks import Hooks, LogitsHook, apply
from ..params import Retrieval
from .ahead import Ahead, ahead, finite_rows
from .batch import SCORED, Key
from .neighbours import Asked, Found, Mixing, Query
from .ngrams import NgramQuery, Suffix, Unigrams, context_of
from .sequence import Sequence, sequence_of

PASSAGES = 1024  # hits with passages that an index answers at once

Array = np.ndarray[Any, Any]
Sent = tuple[Any, Key, int]  # message, request, sequence number
Drawn = tuple[Sequence, int, tuple[Found, ...]]  # a row to be sampled: its position, and what is to be mixed in
MIXING = Mixing()
NOT_FINITE = "the model's hidden state is not finite: its weights may be damaged, or its dtype too narrow"


@dataclass(slots=True)
class Outcome:
    """What follows from a step: messages to askers, rows that go back to the leader, queries to indexes."""

    sent: list[Sent] = field(default_factory=list)
    returns: list[Return] = field(default_factory=list)
    queries: list[Asked] = field(default_factory=list)


class Last:
    """Sampling, scoring and retrieval of the last span; `ahead`: what can be is drawn where the logits are."""

    def __init__(self, span: Span, fingerprint: str, hooks: Hooks | None = None, ahead: bool = False) -> None:
        self._span = span
        self._ahead = ahead
        self._hooks = hooks or {}
        # A checkpoint whose vocabulary was cut down may still name an id behind it.
        self._eos = frozenset(token for token in span.config.eos_ids if token < span.config.vocab)
        self._sequences: dict[Key, Sequence] = {}
        self._unigrams: dict[str, Unigrams] = {}  # of each index, as it told last
        self._info = {
            "fingerprint": fingerprint,
            "d": span.config.hidden,
            "context": span.config.context,
            "vocab": span.config.vocab,
        }

    def __len__(self) -> int:
        return len(self._sequences)

    def knows(self, keys: Iterable[Key]) -> bool:
        """Whether one of them, at least, goes on; may be asked by any thread."""
        return any(key in self._sequences for key in keys)

    def start(self, key: Key, prompt: Array, params: dict[str, Any]) -> None:
        """The first STEP of a sequence is about to be served."""
        self._sequences[key] = sequence_of(key, prompt, params, self._eos, time.monotonic())

    def end(self, key: Key, outcome: Outcome) -> None:
        """The leader lists a sequence as over: it is forgotten, and the row that the leader may wait for goes back.

        Its last STEP has been here before, so that no stage writes to its blocks after this.
        """
        self._sequences.pop(key, None)
        outcome.returns.append(Return(*key, -1, True))

    def step(self, rows: tuple[Row, ...], hidden: torch.Tensor, entered: torch.Tensor) -> Outcome:
        """Samples the next token of each row, or parks it, or scores it.

        A row that does not reach the last token known so far is a chunk of a longer prompt, or of a sequence that is
        computed again: it may ask an index, and nothing of it goes back.

        Args:
            hidden: output of the last layer, [sum of lengths, d].
            entered: what entered the last layer's FFN, the same shape.
        """
        outcome = Outcome()
        known: list[tuple[Sequence, Row, int]] = []  # with the place of the row's last token
        place = 0
        early = ahead(self._span, rows, hidden, self._sequences) if self._ahead else Ahead(finite_rows(rows, hidden))
        self._fail_broken(rows, early, outcome)
        for row in rows:
            place += row.length
            sequence = self._sequences.get((row.id, row.attempt))
            if sequence is None:  # ended meanwhile: the rest of the batch goes on
                outcome.returns.append(Return(row.id, row.attempt, -1, True))
            elif sequence.task.mode == "score":
                part = slice(place - row.length, place)
                self._score(sequence, row.position, hidden[part], entered[part], outcome)
            else:
                known.append((sequence, row, place - 1))
        if known:
            self._ask(known, entered, outcome)
            self._sample(self._ready(known, outcome), early, hidden, outcome)
        return outcome

    def _ready(self, known: list[tuple[Sequence, Row, int]], outcome: Outcome) -> list[tuple[Sequence, int]]:
        """Sequences whose next token can be sampled now, with the place of their last token."""
        ready: list[tuple[Sequence, int]] = []
        for sequence, row, last in known:
            if sequence.key not in self._sequences:  # it has just failed
                outcome.returns.append(Return(*sequence.key, -1, True))
            elif sequence.ends(row):
                ready.append((sequence, last))
        return ready

    def answered(self, query: Asked, answers: Iterable[Found]) -> Outcome:
        """What was asked for came: rows that waited for it are sampled; those of ended sequences are dropped."""
        outcome = Outcome()
        for key, position, found in zip(query.keys, query.positions, answers, strict=True):
            if isinstance(found, Suffix):
                self._unigrams[query.index] = found.unigrams
            sequence = self._sequences.get(key)
            if sequence is None:
                continue
            sequence.answers[position, query.part] = found
            if sequence.parked is not None:
                logits, at = sequence.parked
                parts = sequence.found(at)
                if parts is not None:
                    sequence.parked = None
                    self._draw([(sequence, at, parts)], logits[None], outcome)
        return outcome

    def fail(self, keys: list[Key], error: RalmqError) -> Outcome:
        """Ends sequences with an error to their askers, as where an index failed that these rows asked.

        A row that is parked goes back to the leader; one that is on its way to here will, once it arrives.
        """
        outcome = Outcome()
        for key in dict.fromkeys(keys):
            sequence = self._sequences.pop(key, None)
            if sequence is not None:
                outcome.sent.append((Error(error.code, error.message[:2000]), key, 0))
                if sequence.parked is not None:
                    outcome.returns.append(Return(*key, -1, True))
        return outcome

    # -- inside

    def _ask(self, known: list[tuple[Sequence, Row, int]], entered: torch.Tensor, outcome: Outcome) -> None:
        """One query for the rows that ask the same index alike; more only where passages are too many for one.

        Where a policy has two parts, each asks by itself, both at once.
        """
        queries: list[tuple[Asked, list[int]]] = []
        groups: dict[tuple[Any, ...], tuple[Asked, list[int]]] = {}
        for sequence, row, last in known:
            retrieval = sequence.task.retrieve
            for position in sequence.asks(row):
                assert retrieval is not None
                for part in retrieval.parts:
                    group = _group(part, retrieval)
                    if group not in groups or _full(groups[group][0]):
                        groups[group] = self._query(part, retrieval), []
                        queries.append(groups[group])
                    query, places = groups[group]
                    query.keys.append(sequence.key)
                    query.positions.append(position)
                    if isinstance(query, NgramQuery):
                        query.contexts.append(context_of(sequence.history.tokens, position, query.order))
                    places.append(last - (row.position + row.length - position))
        for query, places in queries:
            if isinstance(query, Query):
                query.vectors = entered[torch.tensor(places)].float().cpu().numpy()
                self._drop_broken(query, outcome)
        for query, _ in queries:
            query.until = max((self._sequences[key].until for key in query.keys if key in self._sequences), default=0.0)
            if query.until:
                outcome.queries.append(query)

    def _query(self, part: str, retrieval: Retrieval) -> Asked:
        """One of a part, without rows."""
        if part == "knn":
            return Query(retrieval.index, retrieval.k, retrieval.nprobe, retrieval.passages)
        known = self._unigrams.get(retrieval.index)
        return NgramQuery(retrieval.index, retrieval.order, retrieval.staleness, known)

    def _fail_broken(self, rows: tuple[Row, ...], early: Ahead, outcome: Outcome) -> None:
        """Rows whose hidden states are not finite fail, and no others: their tokens would be noise without a word."""
        broken = [(row.id, row.attempt) for row, finite in zip(rows, early.finite, strict=True) if not finite]
        if broken:
            outcome.sent += self.fail(broken, WorkerFailed(NOT_FINITE)).sent

    def _drop_broken(self, query: Query, outcome: Outcome) -> None:
        """An index refuses a query with a vector that is not finite: its row alone fails, and is not asked for."""
        if np.isfinite(query.vectors).all():
            return
        broken = [key for key, row in zip(query.keys, query.vectors, strict=True) if not np.isfinite(row).all()]
        outcome.sent += self.fail(broken, WorkerFailed(NOT_FINITE)).sent
        kept = [place for place, key in enumerate(query.keys) if key in self._sequences]
        query.keys = [query.keys[place] for place in kept]
        query.positions = [query.positions[place] for place in kept]
        query.vectors = query.vectors[kept]

    def _sample(self, ready: list[tuple[Sequence, int]], early: Ahead, hidden: torch.Tensor, outcome: Outcome) -> None:
        for sequence, _ in ready:
            if sequence.key in early.drawn:
                self._took(sequence, early.body(sequence), outcome)
        ready = [(sequence, last) for sequence, last in ready if sequence.key not in early.drawn]
        if not ready:
            return
        logits = self._span.head(hidden, [last for _, last in ready]).cpu().numpy()
        drawn: list[Drawn] = []
        places: list[int] = []
        for place, (sequence, _) in enumerate(ready):
            found = sequence.found(sequence.total)
            if found is None:
                sequence.parked = logits[place].copy(), sequence.total  # a view would keep the whole batch's logits
            else:
                drawn.append((sequence, sequence.total, found))
                places.append(place)
        if drawn:
            self._draw(drawn, logits[places] if len(places) < len(logits) else logits, outcome)

    def _draw(self, rows: list[Drawn], logits: Array, outcome: Outcome) -> None:
        """Samples rows (sequence, position, what is to be mixed in) from their logits [rows, vocab].

        Those that retrieval or hooks change go one by one: each may fail, and in float64.
        """
        plain = [place for place, (s, _, found) in enumerate(rows) if not found and not s.task.hooks]
        if plain:
            some = logits[plain] if len(plain) < len(logits) else logits
            self._take([rows[place] for place in plain], some, outcome)
        for place in sorted(set(range(len(rows))) - set(plain)):
            sequence, _, found = rows[place]
            try:
                changed = self._changed(sequence, found, logits[place])
            except RalmqError as error:
                self._failed(sequence, error, outcome)
            else:
                self._take([rows[place]], changed[None], outcome)

    def _failed(self, sequence: Sequence, error: RalmqError, outcome: Outcome) -> None:
        """A row that was to be sampled now ends with an error, and goes back."""
        outcome.sent += self.fail([sequence.key], error).sent
        outcome.returns.append(Return(*sequence.key, -1, True))

    def _changed(self, sequence: Sequence, found: tuple[Found, ...], logits: Array) -> Array:
        """Logits [vocab] after what was retrieved is mixed in, and after the hooks that the request names.

        Raises:
            WorkerFailed: one of them failed, such as neighbours of another vocabulary.
        """
        retrieval = sequence.task.retrieve
        steps: list[tuple[str, LogitsHook | None, dict[str, Any]]] = []
        if found and retrieval is not None:
            given = {"retrieval": retrieval, "metric": sequence.metric, "found": found}
            steps.append((f"index {retrieval.index}", MIXING, given))
        steps += [(f"hook {name}", self._hooks.get(name), given) for name, given in sequence.task.hooks.items()]
        for name, hook, given in steps:
            if hook is None:
                raise WorkerFailed(f"{name} is not loaded at the last stage: start every stage with the same -o hooks")
            try:
                logits = apply(hook, sequence.history.tokens, logits, given)
            except Exception as error:  # its own code, or an index's data: this row alone fails
                raise WorkerFailed(f"{name}: {error or type(error).__name__}"[:2000]) from error
        return logits

    def _take(self, rows: list[Drawn], logits: Array, outcome: Outcome) -> None:
        """Draws tokens: of each one PARTIAL to the asker, one row back to the leader, and the end where it is due.

        Where that raises, rows go one by one: the one that cannot be sampled fails, and no other.
        """
        try:
            bodies = _drawn(rows, logits)
        except Exception as error:
            if len(rows) > 1:
                for place, row in enumerate(rows):
                    self._take([row], logits[place : place + 1], outcome)
            else:
                said = WorkerFailed(f"the next token cannot be sampled: {type(error).__name__}: {error}"[:2000])
                self._failed(rows[0][0], said, outcome)
            return
        for (sequence, _, _), body in zip(rows, bodies, strict=True):
            self._took(sequence, body, outcome)

    def _took(self, sequence: Sequence, body: dict[str, Any], outcome: Outcome) -> None:
        """One PARTIAL; that of the last token says so, since the FINAL behind it may be lost with its worker."""
        token = body["token"]
        stopped = token in sequence.task.stop_ids or (token in self._eos and not sequence.task.ignore_eos)
        done = stopped or sequence.made + 1 >= sequence.limit
        if done:
            body["ended"] = "stop" if stopped else "length"
        outcome.sent.append((Partial(body), sequence.key, sequence.made))
        sequence.made += 1
        sequence.history.add(token)
        if done:
            ending = {"finish_reason": body["ended"], "completion_tokens": sequence.made}
            outcome.sent.append((Final(ending), sequence.key, 0))
            del self._sequences[sequence.key]
        outcome.returns.append(Return(*sequence.key, token, done))

    def _score(
        self, sequence: Sequence, position: int, hidden: torch.Tensor, entered: torch.Tensor, outcome: Outcome
    ) -> None:
        """Hidden states and log p of each following token, a few positions a PARTIAL, so that logits of these exist.

        `position` is that of the first of `hidden`; what was sent before (a sequence computed again) is not repeated.
        """
        targets = sequence.prompt[1:]
        end = min(position + len(hidden), len(targets))
        for first in range(max(position, sequence.scored), end, SCORED):
            after = min(first + SCORED, end)
            part = slice(first - position, after - position)
            logits = self._span.head(hidden[part]).cpu().numpy()
            tensors: list[Array] = [entered[part].float().cpu().numpy()] if sequence.task.states else []
            with np.errstate(invalid="ignore"):
                tensors.append(log_probs_of(logits, targets[first:after]))
            if not np.isfinite(tensors[-1]).all():
                self._failed(sequence, WorkerFailed(f"the prompt cannot be scored: {NO_LOGITS}"), outcome)
                return
            if sequence.task.top_logprobs:
                tensors += top_log_probs(logits, sequence.task.top_logprobs)
            body = {"position": first, "count": after - first, **self._info}
            outcome.sent.append((Partial(body, tensors), sequence.key, sequence.parts))
            sequence.parts += 1
            sequence.scored = after
        if end == len(targets):
            outcome.sent.append((Final({"count": end, **self._info}), sequence.key, 0))
            del self._sequences[sequence.key]
            outcome.returns.append(Return(*sequence.key, -1, True))


def _group(part: str, retrieval: Retrieval) -> tuple[Any, ...]:
    """What rows that ask together have in common."""
    index = retrieval.index
    if part == "knn":
        return part, index, retrieval.k, retrieval.nprobe, retrieval.passages
    return part, index, retrieval.order, retrieval.staleness


def _full(query: Asked) -> bool:
    return isinstance(query, Query) and query.passages and (len(query.keys) + 1) * query.k > PASSAGES


def _drawn(rows: list[Drawn], logits: Array) -> list[dict[str, Any]]:
    """What each row's PARTIAL says: its token, and what was asked for beside it."""
    sequences = [sequence for sequence, _, _ in rows]
    tokens, log_p = sample_rows(
        logits,
        [sequence.sampling for sequence in sequences],
        [sequence.told(position) for sequence, position, _ in rows],
        [sequence.history for sequence in sequences],
    )
    bodies: list[dict[str, Any]] = []
    for place, (sequence, position, found) in enumerate(rows):
        body: dict[str, Any] = {"token": tokens[place], "position": sequence.told(position)}
        if log_p[place] is not None:
            body["logprob"] = log_p[place]
        if top := sequence.sampling.top_logprobs:
            ids, values = top_log_probs(logits[place : place + 1], top)
            body["top_logprobs"] = list(zip(ids[0].tolist(), values[0].tolist(), strict=True))
        if passages := [passage for part in found for passage in part.passages]:
            body["passages"] = passages
        bodies.append(body)
    return bodies
