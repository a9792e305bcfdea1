"""The last stage on a span whose hidden states are a table by position; neighbours that follow from the query.

Knows no test.
"""

import math
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import torch
from ralmq.schema.message import Final, Partial, Return, Row
from ralmq.schema.tensor import tensor_of
from ralmq.workers.hooks import LogitsHook
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.suffix import NgramTable
from ralmq.workers.params import Task
from ralmq.workers.stage.batch import Key
from ralmq.workers.stage.last import Last, Outcome
from ralmq.workers.stage.neighbours import Asked, Found, Neighbours, Query

D, VOCAB, CONTEXT, EOS = 4, 16, 1200, 2
random = np.random.default_rng(0)
HIDDEN = torch.tensor(random.normal(size=(CONTEXT, D)), dtype=torch.float32)
ENTERED = torch.tensor(random.normal(size=(CONTEXT, D)), dtype=torch.float32)
STREAM = TokenStream((random.zipf(1.5, 500) % (VOCAB - 1)).astype(np.int32), ("a", "b"), np.array([0, 230]))
NGRAMS = NgramTable(STREAM, "stream")
HEAD = torch.tensor(random.normal(size=(D, VOCAB)), dtype=torch.float32)


class Head:
    """What Last needs of a span."""

    config = SimpleNamespace(eos_ids=(EOS,), hidden=D, context=CONTEXT, vocab=VOCAB)

    def head(self, hidden: torch.Tensor, want: Any = None) -> torch.Tensor:
        return (hidden if want is None else hidden[torch.tensor(want)]) @ HEAD


class Ways:
    """Whether tokens are drawn where logits are, as on an accelerator."""

    ahead = False


def new(hooks: dict[str, LogitsHook] | None = None) -> Last:
    return Last(Head(), "print", hooks, Ways.ahead)  # type: ignore[arg-type]


def key_of(number: int) -> Key:
    return number.to_bytes(16, "big"), 0


def start(last: Last, number: int, length: int, /, metric: str = "l2", **task: Any) -> Key:
    body = Task(**{"ignore_eos": True, **task})
    params = {"task": msgpack.packb(body.model_dump(exclude_defaults=True)), "limit": body.max_tokens, "metric": metric}
    last.start(key_of(number), np.arange(length, dtype=np.int32) % VOCAB, params)
    return key_of(number)


def step(last: Last, *rows: tuple[Key, int, int]) -> Outcome:
    """A micro-batch of rows (key, position, length)."""
    places = torch.tensor([p for _, position, length in rows for p in range(position, position + length)])
    made = tuple(Row(*key, position, length, ()) for key, position, length in rows)
    return last.step(made, HIDDEN[places], ENTERED[places])


def neighbours(vector: np.ndarray, k: int) -> Neighbours:
    """An index whose neighbours follow from the vector alone."""
    own = np.random.default_rng(abs(int(vector[0] * 1e6)))
    following = own.integers(0, VOCAB, (k, 8)).astype(np.int32)
    following[-1] = -1  # behind a document's end
    return Neighbours(own.uniform(0, 30, k).astype(np.float32), following, [])


def merged(first: Outcome, *others: Outcome) -> Outcome:
    for other in others:
        first.sent += other.sent
        first.returns += other.returns
        first.queries += other.queries
    return first


def found(query: Asked) -> list[Found]:
    """What an index answers: n-grams of STREAM, or neighbours."""
    if isinstance(query, Query):
        return [neighbours(vector, query.k) for vector in query.vectors]
    body, arrays = NGRAMS.answer(query.body, query.tensors)
    return list(query.answers(body, tuple(map(tensor_of, arrays))))


def answered(last: Last, queries: list[Asked]) -> Outcome:
    return merged(Outcome(), *[last.answered(query, found(query)) for query in queries])


def chunked(last: Last, key: Key, end: int, size: int, begin: int = 0) -> Outcome:
    """Positions up to `end` in rows of at most `size`; what all but the last of them give."""
    outcomes = [step(last, (key, place, min(size, end - place))) for place in range(begin, end, size)]
    for outcome in outcomes[:-1]:
        assert not outcome.sent and not outcome.returns, "a chunk that does not reach the end gives nothing back"
        outcomes[-1].queries[:0] = outcome.queries
    return outcomes[-1]


def run(last: Last, key: Key, prompt: int) -> tuple[list[dict[str, Any]], list[Any], dict[str, Any]]:
    """All tokens of one sequence alone: bodies of its parts, the queries sent, and its end."""
    parts: list[dict[str, Any]] = []
    queries: list[Any] = []
    position, length = 0, prompt
    while True:
        outcome = step(last, (key, position, length))
        asked = list(outcome.queries)
        queries += asked
        merged(outcome, answered(last, asked))
        for message, whose, number in outcome.sent:
            assert whose == key
            if isinstance(message, Final):
                assert outcome.returns == [Return(*key, parts[-1]["token"], True)]
                return parts, queries, message.body
            assert isinstance(message, Partial) and number == len(parts)
            parts.append(message.body)
        assert outcome.returns == [Return(*key, parts[-1]["token"], False)]
        position, length = position + length, 1


def lm(position: int) -> np.ndarray:
    """p of the token at a position, float64."""
    logits = (HIDDEN[position - 1] @ HEAD).double().numpy()
    p = np.exp(logits - logits.max())
    return p / p.sum()


def knn(position: int, k: int, temperature: float, which: int, metric: str = "l2") -> np.ndarray:
    """kNN-LM's p, straight from its definition, of the query at a position."""
    found = neighbours(ENTERED[position - 1].numpy(), k)
    p = np.zeros(VOCAB)
    for distance, tokens in zip(found.distances.astype(np.float64), found.following, strict=True):
        if tokens[which] >= 0:
            p[tokens[which]] += math.exp((-distance if metric == "l2" else distance) / temperature)
    return p / p.sum()
