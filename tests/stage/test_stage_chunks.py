"""Rows that are parts: of a prompt, of a sequence that is computed again, of a score."""

import math
from typing import Any

import numpy as np
import pytest
from ralmq.schema.message import Error, Partial, Return, Row
from ralmq.workers.params import Retrieval
from ralmq.workers.stage.batch import SCORED as CHUNK
from ralmq.workers.stage.neighbours import Query
from stage.table import ENTERED, HIDDEN, answered, chunked, lm, merged, new, run, start, step


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_a_prompt_in_chunks_is_sampled_at_its_end(size: int) -> None:
    options = {"max_tokens": 3, "temperature": 1.0, "seed": 4, "logprobs": True}
    last = new()
    whole = step(last, (start(last, 1, 20, **options), 0, 20))
    key = start(last, 2, 20, **options)
    outcome = chunked(last, key, 20, size)
    assert [(m, n) for m, _, n in outcome.sent] == [(m, n) for m, _, n in whole.sent]
    assert outcome.returns == [Return(*key, whole.returns[0].token, False)]
    behind_a_cached_prefix = start(last, 3, 20, **options)
    assert [m for m, _, _ in chunked(last, behind_a_cached_prefix, 20, 3, begin=16).sent] == [whole.sent[0][0]]


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("cut", [1, 2, 5, 9])
@pytest.mark.parametrize(("interval", "staleness"), [(1, 0), (3, 0), (2, 3), (1, 7)])
def test_a_sequence_that_is_computed_again_goes_on_and_asks_nothing_twice(
    interval: int, staleness: int, cut: int, size: int
) -> None:
    """Preempted after `cut` tokens; answers that are not needed yet come when all is computed again."""
    retrieval = Retrieval(index="i", interval=interval, staleness=staleness, knn_lambda=0.7)
    options = {"retrieve": retrieval, "temperature": 1.0, "seed": 11, "logprobs": True, "max_tokens": 12}
    last = new()
    whole, asked, _ = run(last, start(last, 1, 6, **options, frequency_penalty=1.0), 6)
    key = start(last, 2, 6, **options, frequency_penalty=1.0)
    parts: list[dict[str, Any]] = []
    positions: list[int] = []
    late: list[Query] = []
    position, length = 0, 6
    while len(last):
        again = len(parts) == cut
        outcome = chunked(last, key, 6 + cut, size) if again else step(last, (key, position, length))
        positions += [p for query in outcome.queries for p in query.positions]
        late += outcome.queries
        if len(parts) != cut - 1 or not outcome.sent:
            late = merged(outcome, answered(last, late)).queries[:0]
        parts += [message.body for message, _, _ in outcome.sent if isinstance(message, Partial)]
        position, length = 6 + len(parts) - 1, 1
    assert parts == whole
    assert positions == [p for query in asked for p in query.positions]


def test_a_chunk_whose_query_is_broken_ends_its_sequence() -> None:
    last = new()
    key = start(last, 1, 9, max_tokens=9, prompt=2, retrieve=Retrieval(index="i", staleness=7))
    bad = ENTERED[:4].clone()
    bad[3] = math.nan
    outcome = last.step((Row(*key, 0, 4, ()),), HIDDEN[:4], bad)
    assert [type(message) for message, _, _ in outcome.sent] == [Error] and not outcome.queries
    assert outcome.returns == [Return(*key, -1, True)] and len(last) == 0
    assert step(last, (key, 4, 5)).returns == [Return(*key, -1, True)]


@pytest.mark.parametrize("size", [100, CHUNK, CHUNK + 1, 10_000])
def test_a_score_in_chunks(size: int) -> None:
    last = new()
    count = 2 * CHUNK + 50
    key = start(last, 1, count + 1, mode="score")
    whole = step(last, (key, 0, count)).sent
    start(last, 1, count + 1, mode="score")
    outcomes = [step(last, (key, place, min(size, count - place))) for place in range(0, count, size)]
    assert [outcome.returns for outcome in outcomes] == [[]] * (len(outcomes) - 1) + [[Return(*key, -1, True)]]
    *parts, final = [sent for outcome in outcomes for sent in outcome.sent]
    assert [number for _, _, number in parts] == list(range(len(parts))) and final == whole[-1]
    reached = 0
    for message, _, _ in parts:
        assert message.body["position"] == reached and message.body["count"] == len(message.tensors[1]) <= CHUNK
        reached += message.body["count"]
    assert reached == count
    for place in (0, 1):
        joined = [np.concatenate([message.tensors[place] for message, _, _ in sent]) for sent in (parts, whole[:-1])]
        assert np.allclose(*joined, atol=1e-6)


def test_a_score_that_is_computed_again_repeats_nothing() -> None:
    last = new()
    key = start(last, 1, 101, mode="score")
    sent = step(last, (key, 0, 60)).sent
    assert step(last, (key, 0, 40)).sent == []
    sent += step(last, (key, 40, 60)).sent
    assert [message.body["position"] for message, _, _ in sent[:-1]] == [0, 60]
    assert [number for _, _, number in sent] == [0, 1, 0] and len(last) == 0


def test_a_score_without_states_and_with_alternatives() -> None:
    last = new()
    full = step(last, (start(last, 1, 31, mode="score"), 0, 30)).sent[0][0]
    bare = step(last, (start(last, 2, 31, mode="score", states=False, top_logprobs=3), 0, 30)).sent[0][0]
    log_p, ids, values = bare.tensors
    assert np.array_equal(log_p, full.tensors[1]) and ids.shape == values.shape == (30, 3)
    for place in range(30):
        p = lm(place + 1)
        assert ids[place].tolist() == np.argsort(-p, kind="stable")[:3].tolist()
        assert np.allclose(values[place], np.log(np.sort(p)[:-4:-1]), atol=1e-5)
