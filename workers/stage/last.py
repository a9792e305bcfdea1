"""What the last stage knows of each sequence: its parameters, what it waits for, what is sampled. Knows no socket.

All of it runs in the compute thread. Rows that wait for neighbours are parked with their logits; the others go on.
"""

import time
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import torch

from ...schema.errors import RalmqError, WorkerFailed
from ...schema.message import Error, Final, Partial, Return, Row
from ..engine.sample import (
    SamplingParams,
    choose,
    knn_distribution,
    log_prob,
    log_probs_of,
    mix,
    probabilities,
    sample_rows,
)
from ..engine.span import Span
from ..params import Task
from .leader import Key
from .neighbours import Neighbours, Query

CHUNK = 256  # positions of a score in one PARTIAL
PASSAGES = 1024  # hits with passages that an index answers at once

Array = np.ndarray[Any, Any]
Sent = tuple[Any, Key, int]  # message, request, sequence number


@dataclass(slots=True)
class Outcome:
    """What follows from a step: messages to askers, rows that go back to the leader, queries to indexes."""

    sent: list[Sent] = field(default_factory=list)
    returns: list[Return] = field(default_factory=list)
    queries: list[Query] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence at the last stage.

    Attributes:
        task: its parameters.
        prompt: ids of the prompt, int32 [n].
        start: absolute position of the first new token; interval and staleness count from there.
        limit: new tokens at most in this attempt.
        until: its deadline (time.monotonic()).
        answers: neighbours by the position of their query.
        parked: logits [vocab] of the row that waits, and its position.
    """

    key: Key
    task: Task
    prompt: Array
    start: int
    limit: int
    sampling: SamplingParams
    metric: str = "l2"
    until: float = inf
    made: int = 0
    answers: dict[int, Neighbours] = field(default_factory=dict)
    parked: tuple[Array, int] | None = None

    def due(self, position: int) -> int:
        """Position of the query whose answer is mixed in at `position`; -1 for none."""
        retrieval = self.task.retrieve
        if retrieval is None:
            return -1
        asked = position - retrieval.staleness
        return asked if asked >= self.start and not (asked - self.start) % retrieval.interval else -1

    def asks(self, row: Row) -> list[int]:
        """Positions of the queries that this row sends: those due, without any whose answer could never be used.

        One at most, but for the first row of a replay with staleness: it asks anew what the tokens to come still need.
        """
        retrieval = self.task.retrieve
        if retrieval is None:
            return []
        end = row.position + row.length
        first = max(self.start, row.position + 1, end - retrieval.staleness)
        return [
            position
            for position in range(first, end + 1)
            if not (position - self.start) % retrieval.interval
            and position + retrieval.staleness < len(self.prompt) + self.limit
        ]


class Last:
    """Sampling, scoring and retrieval of the last span."""

    def __init__(self, span: Span, fingerprint: str) -> None:
        self._span = span
        self._eos = frozenset(span.config.eos_ids)
        self._sequences: dict[Key, Sequence] = {}
        self._info = {
            "fingerprint": fingerprint,
            "d": span.config.hidden,
            "context": span.config.context,
            "vocab": span.config.vocab,
        }

    def __len__(self) -> int:
        return len(self._sequences)

    def start(self, key: Key, prompt: Array, params: dict[str, Any]) -> None:
        """The first STEP of a sequence is about to be served."""
        task = Task.model_validate(params["task"])
        start = task.prompt or len(prompt)
        sampling = SamplingParams(task.temperature, task.top_k, task.top_p, task.seed, task.logprobs)
        limit = params.get("limit", task.max_tokens)
        until = time.monotonic() + params.get("seconds", inf)
        metric = params.get("metric", "l2")
        self._sequences[key] = Sequence(key, task, prompt, start, limit, sampling, metric, until)

    def end(self, key: Key, outcome: Outcome) -> None:
        """The leader lists a sequence as over: it is forgotten, and the row that the leader may wait for goes back.

        Its last STEP has been here before, so that no stage writes to its blocks after this.
        """
        self._sequences.pop(key, None)
        outcome.returns.append(Return(*key, -1, True))

    def step(self, rows: tuple[Row, ...], hidden: torch.Tensor, entered: torch.Tensor) -> Outcome:
        """Samples the next token of each row, or parks it, or scores it.

        Args:
            hidden: output of the last layer, [sum of lengths, d].
            entered: what entered the last layer's FFN, the same shape.
        """
        outcome = Outcome()
        known: list[tuple[Sequence, Row, int]] = []  # with the place of the row's last token
        place = 0
        for row in rows:
            place += row.length
            sequence = self._sequences.get((row.id, row.attempt))
            if sequence is None:  # ended meanwhile: the rest of the batch goes on
                outcome.returns.append(Return(row.id, row.attempt, -1, True))
            elif sequence.task.mode == "score":
                self._score(sequence, hidden[place - row.length : place], entered[place - row.length : place], outcome)
            else:
                known.append((sequence, row, place - 1))
        if known:
            logits = self._span.head(hidden, [last for _, _, last in known]).cpu().numpy()
            self._ask(known, entered, outcome)
            self._sample([(s, row.position + row.length) for s, row, _ in known], logits, outcome)
        return outcome

    def answered(self, query: Query, answers: list[Neighbours]) -> Outcome:
        """Neighbours came: rows that waited for them are sampled; those of ended sequences are dropped."""
        outcome = Outcome()
        for key, position, found in zip(query.keys, query.positions, answers, strict=True):
            sequence = self._sequences.get(key)
            if sequence is None:
                continue
            sequence.answers[position] = found
            if sequence.parked is not None and sequence.due(sequence.parked[1]) in sequence.answers:
                logits, at = sequence.parked
                sequence.parked = None
                self._draw(sequence, at, logits, outcome)
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
        """One query per index and (k, nprobe) for the rows that ask; more only where passages are too many for one."""
        queries: list[tuple[Query, list[int]]] = []
        groups: dict[tuple[Any, ...], tuple[Query, list[int]]] = {}
        for sequence, row, last in known:
            retrieval = sequence.task.retrieve
            for position in sequence.asks(row):
                assert retrieval is not None
                group = (retrieval.index, retrieval.k, retrieval.nprobe, retrieval.passages)
                if group not in groups or (retrieval.passages and (len(groups[group][1]) + 1) * retrieval.k > PASSAGES):
                    groups[group] = Query(*group), []
                    queries.append(groups[group])
                query, places = groups[group]
                query.keys.append(sequence.key)
                query.positions.append(position)
                places.append(last - (row.position + row.length - position))
        for query, places in queries:
            query.vectors = entered[torch.tensor(places)].float().cpu().numpy()
            self._drop_broken(query, outcome)
            query.until = max((self._sequences[key].until for key in query.keys), default=query.until)
            if query.keys:
                outcome.queries.append(query)

    def _drop_broken(self, query: Query, outcome: Outcome) -> None:
        """An index refuses a query with a vector that is not finite: its row alone fails, and is not asked for."""
        if np.isfinite(query.vectors).all():
            return
        broken = [key for key, row in zip(query.keys, query.vectors, strict=True) if not np.isfinite(row).all()]
        text = "the model's hidden state is not finite: its weights may be damaged, or its dtype too narrow"
        outcome.sent += self.fail(broken, WorkerFailed(text)).sent
        kept = [place for place, key in enumerate(query.keys) if key in self._sequences]
        query.keys = [query.keys[place] for place in kept]
        query.positions = [query.positions[place] for place in kept]
        query.vectors = query.vectors[kept]

    def _sample(self, rows: list[tuple[Sequence, int]], logits: Array, outcome: Outcome) -> None:
        plain: list[int] = []
        for place, (sequence, position) in enumerate(rows):
            due = sequence.due(position)
            if sequence.key not in self._sequences:  # it has just failed
                outcome.returns.append(Return(*sequence.key, -1, True))
            elif due < 0:
                plain.append(place)
            elif due in sequence.answers:
                self._draw(sequence, position, logits[place], outcome)
            else:
                sequence.parked = logits[place].copy(), position  # a view would keep the whole batch's logits
        if plain:
            chosen = [rows[place] for place in plain]
            drawn = sample_rows(logits[plain], [s.sampling for s, _ in chosen], [position for _, position in chosen])
            for (sequence, position), token, log_p in zip(chosen, *drawn, strict=True):
                self._took(sequence, position, token, log_p, None, outcome)

    def _draw(self, sequence: Sequence, position: int, logits: Array, outcome: Outcome) -> None:
        """Mixes the neighbours' next tokens with the model's, then samples: p = lambda p_knn + (1 - lambda) p_lm."""
        retrieval = sequence.task.retrieve
        assert retrieval is not None
        found = sequence.answers.pop(sequence.due(position))
        distances = found.distances if sequence.metric == "l2" else -found.distances
        values = found.following[:, retrieval.staleness]
        try:
            p = probabilities(logits[None])[0]
            neighbours = knn_distribution(distances, values, len(p), retrieval.knn_temperature)
            p = mix(p, *neighbours, retrieval.knn_lambda)
            token = choose(p, sequence.sampling, position)
        except Exception as error:  # such as neighbours of another vocabulary: this row alone fails
            del self._sequences[sequence.key]
            said = f"index {retrieval.index}: {error}"[:2000]
            outcome.sent.append((Error(WorkerFailed.code, said), sequence.key, 0))
            outcome.returns.append(Return(*sequence.key, -1, True))
            return
        log_p = log_prob(p, token) if sequence.sampling.logprobs else None
        self._took(sequence, position, token, log_p, found, outcome)

    def _took(
        self,
        sequence: Sequence,
        position: int,
        token: int,
        log_p: float | None,
        found: Neighbours | None,
        outcome: Outcome,
    ) -> None:
        """A token is sampled: one PARTIAL to the asker, one row back to the leader, and the end where this was it."""
        body: dict[str, Any] = {"token": token, "position": position}
        if log_p is not None:
            body["logprob"] = log_p
        if found is not None and found.passages:
            body["passages"] = found.passages
        outcome.sent.append((Partial(body), sequence.key, sequence.made))
        sequence.made += 1
        stopped = token in sequence.task.stop_ids or (token in self._eos and not sequence.task.ignore_eos)
        done = stopped or sequence.made >= sequence.limit
        if done:
            ending = {"finish_reason": "stop" if stopped else "length", "completion_tokens": sequence.made}
            outcome.sent.append((Final(ending), sequence.key, 0))
            del self._sequences[sequence.key]
        outcome.returns.append(Return(*sequence.key, token, done))

    def _score(self, sequence: Sequence, hidden: torch.Tensor, entered: torch.Tensor, outcome: Outcome) -> None:
        """Hidden states and log p of each following token, a chunk a PARTIAL, so that logits of one chunk exist."""
        targets = sequence.prompt[1:]
        for number, first in enumerate(range(0, len(hidden), CHUNK)):
            part = slice(first, first + CHUNK)
            logits = self._span.head(hidden[part]).cpu().numpy()
            log_p = log_probs_of(logits, targets[part])
            keys = entered[part].float().cpu().numpy()
            body = {"position": first, "count": len(log_p), **self._info}
            outcome.sent.append((Partial(body, [keys, log_p]), sequence.key, number))
        outcome.sent.append((Final({"count": len(hidden), **self._info}), sequence.key, 0))
        del self._sequences[sequence.key]
        outcome.returns.append(Return(*sequence.key, -1, True))
