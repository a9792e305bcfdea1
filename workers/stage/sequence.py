"""One sequence at the last stage: its parameters, what it waits for, which queries are due. Knows no other sequence."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

import msgpack
import numpy as np

from ...schema.message import Row
from ..engine.logits import History
from ..engine.sample import SamplingParams
from ..params import Task
from .batch import Key
from .neighbours import Found

Array = np.ndarray[Any, Any]

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "top_logprobs",
)


@dataclass(slots=True, eq=False)
class Sequence:
    """What the last stage keeps of a sequence.

    Attributes:
        task: its parameters.
        prompt: ids of the prompt, int32 [n].
        start: absolute position of the first new token; interval and staleness count from there.
        limit: new tokens at most in this attempt.
        history: prompt and what was sampled.
        until: its deadline (time.monotonic()).
        made: tokens sampled in this attempt.
        asked: highest position whose query was sent, so that a sequence that is computed again asks once.
        scored, parts: positions that a score has sent, in so many PARTIALs.
        answers: what was found, by the position of its query and the part of the policy that asked.
        parked: logits [vocab] of the row that waits, and its position.
    """

    key: Key
    task: Task
    prompt: Array
    start: int
    limit: int
    sampling: SamplingParams
    history: History
    metric: str = "l2"
    until: float = inf
    made: int = 0
    asked: int = -1
    scored: int = 0
    parts: int = 0
    answers: dict[tuple[int, str], Found] = field(default_factory=dict)
    parked: tuple[Array, int] | None = None

    @property
    def total(self) -> int:
        """Tokens known so far: the position of the next one."""
        return len(self.prompt) + self.made

    def told(self, position: int) -> int:
        """A position as the asker counts, who knows nothing of passages before the prompt."""
        return position - self.task.context

    def ends(self, row: Row) -> bool:
        """Whether with this row all tokens known so far are computed, so that the next one can be sampled."""
        return row.position + row.length == self.total

    def due(self, position: int) -> int:
        """Position of the query whose answer is mixed in at `position`; -1 for none."""
        retrieval = self.task.retrieve
        if retrieval is None:
            return -1
        asked = position - retrieval.staleness
        return asked if asked >= self.start and not (asked - self.start) % retrieval.interval else -1

    def found(self, position: int) -> tuple[Found, ...] | None:
        """What is to be mixed in at `position`, taken; empty where nothing is, None while some of it is on the way."""
        asked = self.due(position)
        if asked < 0 or self.task.retrieve is None:
            return ()
        keys = [(asked, part) for part in self.task.retrieve.parts]
        if not all(key in self.answers for key in keys):
            return None
        return tuple(self.answers.pop(key) for key in keys)

    def asks(self, row: Row) -> list[int]:
        """Positions of the queries that this row sends: those due, without any whose answer could never be used.

        One at most, but for the first rows of a replay with staleness: they ask anew what the tokens to come still
        need.
        """
        retrieval = self.task.retrieve
        if retrieval is None:
            return []
        first = max(self.start, row.position + 1, self.total - retrieval.staleness, self.asked + 1)
        positions = [
            position
            for position in range(first, row.position + row.length + 1)
            if not (position - self.start) % retrieval.interval
            and position + retrieval.staleness < len(self.prompt) + self.limit
        ]
        if positions:
            self.asked = positions[-1]
        return positions


def sequence_of(key: Key, prompt: Array, params: dict[str, Any], eos: frozenset[int], now: float) -> Sequence:
    """What the first STEP of a sequence brings: prompt ids, and parameters as the leader writes them."""
    task = Task.model_validate(msgpack.unpackb(params["task"]))
    start = task.prompt or len(prompt)
    wanted = task.logprobs or task.top_logprobs > 0
    sampling = SamplingParams(logprobs=wanted, **{name: getattr(task, name) for name in _SAMPLING})
    stops = {*task.stop_ids, *(() if task.ignore_eos else eos)} if task.min_tokens else ()
    return Sequence(
        key,
        task,
        prompt,
        start,
        params.get("limit", task.max_tokens),
        sampling,
        History(sampling, prompt, start, sorted(stops)),
        params.get("metric", "l2"),
        now + params.get("seconds", inf),
    )
