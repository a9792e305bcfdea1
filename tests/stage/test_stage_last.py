"""The last stage's book-keeping and mixing, on a span whose hidden states are a table by position."""

import math

import numpy as np
import pytest
from ralmq.schema.errors import NoService
from ralmq.schema.message import Error, Final, Partial, Return
from ralmq.workers.engine.sample import SamplingParams, choose
from ralmq.workers.params import Retrieval
from ralmq.workers.stage.batch import SCORED as CHUNK
from ralmq.workers.stage.last import PASSAGES, Outcome
from ralmq.workers.stage.neighbours import Neighbours
from stage.table import CONTEXT, ENTERED, EOS, VOCAB, D, answered, key_of, knn, lm, neighbours, new, run, start, step

pytestmark = pytest.mark.usefixtures("both_ways")


def test_plain_rows_end_by_their_limit() -> None:
    last = new()
    parts, queries, final = run(last, start(last, 1, 3, max_tokens=5, logprobs=True), 3)
    assert [part["position"] for part in parts] == [3, 4, 5, 6, 7] and not queries
    assert [part["token"] for part in parts] == [int(lm(p).argmax()) for p in range(3, 8)]
    assert np.allclose([part["logprob"] for part in parts], [math.log(lm(p).max()) for p in range(3, 8)], atol=1e-6)
    assert final == {"finish_reason": "length", "completion_tokens": 5} and len(last) == 0


def test_stop_ids_and_the_model_s_own_end() -> None:
    greedy = [int(lm(p).argmax()) for p in range(1, CONTEXT)]
    stop = greedy[20]
    last = new()
    parts, _, final = run(last, start(last, 1, 1, max_tokens=1000, stop_ids=(stop,)), 1)
    assert final["finish_reason"] == "stop" and parts[-1]["token"] == stop == greedy[len(parts) - 1]
    assert stop not in greedy[: len(parts) - 1]
    assert EOS in greedy, "the table has the end of text somewhere"
    parts, _, final = run(last, start(last, 2, 1, max_tokens=1000, ignore_eos=False), 1)
    assert final["finish_reason"] == "stop" and len(parts) == greedy.index(EOS) + 1
    _, _, final = run(last, start(last, 3, 1, max_tokens=greedy.index(EOS) + 9), 1)
    assert final["finish_reason"] == "length"


@pytest.mark.parametrize("context", [0, 4])
def test_positions_and_random_numbers_do_not_count_what_was_put_before(context: int) -> None:
    last = new()
    options = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": 5}
    parts, _, _ = run(last, start(last, 1, 9, context=context, **options), 9)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    for place, part in enumerate(parts):
        assert part["position"] == 9 + place - context
        assert part["token"] == choose(lm(9 + place), params, 9 + place - context)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("interval", [1, 3, 8])
@pytest.mark.parametrize("tokens", [10, 64])
def test_interval_and_mixing_follow_their_definition(tokens: int, interval: int, staleness: int) -> None:
    """ceil((T - s) / r) queries; p = lambda p_knn + (1 - lambda) p_lm, with the (1 + s)-th token behind neighbours."""
    k, weight, temperature = 6, 0.4, 7.0
    for metric in ("l2", "ip"):
        last = new()
        retrieval = Retrieval(
            index="i", k=k, interval=interval, staleness=staleness, knn_lambda=weight, knn_temperature=temperature
        )
        key = start(last, 1, 5, metric, max_tokens=tokens, logprobs=True, retrieve=retrieval, temperature=1.0, seed=3)
        parts, queries, _ = run(last, key, 5)
        assert sum(len(query.keys) for query in queries) == math.ceil((tokens - staleness) / interval)
        assert all(query.body == {"k": k, "following": True, "payloads": False} for query in queries)
        mixed = 0
        for new_token, part in enumerate(parts):
            p = lm(5 + new_token)
            if new_token >= staleness and (new_token - staleness) % interval == 0:
                asked = 5 + new_token - staleness
                p = weight * knn(asked, k, temperature, staleness, metric) + (1 - weight) * p
                mixed += 1
            assert abs(math.exp(part["logprob"]) - p[part["token"]]) < 1e-6
        assert mixed == math.ceil((tokens - staleness) / interval)


def test_lambda_0_is_the_model_alone() -> None:
    for options in ({}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.3, "top_k": 4, "top_p": 0.9, "seed": 1}):
        last = new()
        plain, _, _ = run(last, start(last, 1, 4, max_tokens=60, **options), 4)
        retrieval = Retrieval(index="i", knn_lambda=0.0)
        with_it, queries, _ = run(last, start(last, 2, 4, max_tokens=60, retrieve=retrieval, **options), 4)
        assert with_it == plain and len(queries) == 60


@pytest.mark.parametrize(("interval", "staleness"), [(1, 0), (3, 0), (1, 2), (2, 3), (4, 3), (3, 7)])
def test_a_replay_goes_on_as_the_unbroken_run_would(interval: int, staleness: int) -> None:
    """Token ids alone are replayed: neighbours that tokens to come still need are asked for anew."""
    retrieval = Retrieval(index="i", interval=interval, staleness=staleness, knn_lambda=0.7)
    options = {"retrieve": retrieval, "temperature": 1.0, "seed": 11, "logprobs": True}
    last = new()
    whole, _, _ = run(last, start(last, 1, 6, max_tokens=24, **options), 6)
    for cut in range(1, 24):
        key = start(last, 1 + cut, 6 + cut, max_tokens=24 - cut, prompt=6, **options)
        parts, _, _ = run(last, key, 6 + cut)
        assert parts == whole[cut:]


def test_one_query_for_the_rows_that_ask_alike() -> None:
    last = new()
    same = [start(last, n, 3, max_tokens=9, retrieve=Retrieval(index="i", interval=2)) for n in range(4)]
    other = start(last, 8, 4, max_tokens=9, retrieve=Retrieval(index="i", k=5))
    third = start(last, 9, 3, max_tokens=9, retrieve=Retrieval(index="j", nprobe=3))
    plain = start(last, 10, 2, max_tokens=9)
    rows = [(same[0], 0, 3), (other, 0, 4), (plain, 0, 2), (same[1], 0, 3), (third, 0, 3), (same[2], 0, 3)]
    outcome = step(last, *rows, (same[3], 0, 3))
    assert [(query.index, query.keys) for query in outcome.queries] == [("i", same), ("i", [other]), ("j", [third])]
    for query in outcome.queries:
        assert query.vectors.dtype == np.float32
        assert np.array_equal(query.vectors, np.stack([ENTERED[p - 1].numpy() for p in query.positions]))
    assert outcome.queries[2].body["nprobe"] == 3
    assert [whose for _, whose, _ in outcome.sent] == [plain], "the row that asks nothing went on"
    outcome = answered(last, outcome.queries)
    assert sorted(whose for _, whose, _ in outcome.sent) == sorted([*same, other, third])
    assert {row.done for row in outcome.returns} == {False}
    assert len(step(last, *[(key, 3, 1) for key in same]).queries) == 0, "their interval is 2"


def test_passages_of_many_rows_come_in_as_many_queries_as_an_index_answers() -> None:
    last = new()
    keys = [start(last, n, 2, retrieve=Retrieval(index="i", k=450, passages=True)) for n in range(5)]
    queries = step(last, *[(key, 0, 2) for key in keys]).queries
    assert [query.keys for query in queries] == [keys[:2], keys[2:4], keys[4:]]
    assert all(len(query.keys) * query.k <= PASSAGES and query.body["payloads"] for query in queries)
    last = new()
    keys = [start(last, n, 2, retrieve=Retrieval(index="i", k=450)) for n in range(5)]
    assert [query.keys for query in step(last, *[(key, 0, 2) for key in keys]).queries] == [keys]


def test_passages_travel_with_the_token_that_they_were_for() -> None:
    last = new()
    key = start(last, 1, 2, max_tokens=3, retrieve=Retrieval(index="i", k=3, interval=2, passages=True))
    outcome = step(last, (key, 0, 2))
    found = neighbours(outcome.queries[0].vectors[0], 3)
    found.passages = [{"id": 1}, {"id": 2}]
    part = last.answered(outcome.queries[0], [found]).sent[0][0]
    assert part.body["passages"] == [{"id": 1}, {"id": 2}]
    assert "passages" not in step(last, (key, 2, 1)).sent[0][0].body


def test_what_the_leader_lists_as_over_is_forgotten_and_given_back() -> None:
    last = new()
    parked = start(last, 1, 2, retrieve=Retrieval(index="i"))
    plain, gone = start(last, 2, 2), key_of(7)
    queries = step(last, (parked, 0, 2), (plain, 0, 2)).queries
    outcome = Outcome()
    for key in (parked, plain, gone):
        last.end(key, outcome)
    assert outcome.returns == [Return(*key, -1, True) for key in (parked, plain, gone)] and not outcome.sent
    assert len(last) == 0
    assert answered(last, queries) == Outcome(), "an answer that comes too late is dropped"
    assert step(last, (plain, 2, 1)).returns == [Return(*plain, -1, True)]


def test_a_row_that_is_not_known_leaves_the_others_alone() -> None:
    last = new()
    keys = [start(last, n, 2, max_tokens=4) for n in (1, 2)]
    outcome = step(last, (keys[0], 0, 2), (key_of(5), 7, 1), (keys[1], 0, 2))
    assert [(whose, message.body["token"]) for message, whose, _ in outcome.sent] == [
        (key, int(lm(2).argmax())) for key in keys
    ]
    assert Return(*key_of(5), -1, True) in outcome.returns and len(outcome.returns) == 3


def test_a_failed_index_ends_those_who_asked_it() -> None:
    last = new()
    stale = start(last, 1, 2, max_tokens=9, retrieve=Retrieval(index="i", staleness=2))
    parked = start(last, 2, 2, max_tokens=9, retrieve=Retrieval(index="i"))
    other = start(last, 3, 2, max_tokens=9, retrieve=Retrieval(index="j"))
    first, second = step(last, (stale, 0, 2), (parked, 0, 2), (other, 0, 2)).queries
    outcome = last.fail(first.keys, NoService("gone"))
    assert [(message, whose) for message, whose, _ in outcome.sent] == [
        (Error("no_service", "gone"), key) for key in (stale, parked)
    ]
    assert outcome.returns == [Return(*parked, -1, True)], "the row of the other is on its way"
    assert step(last, (stale, 2, 1)).returns == [Return(*stale, -1, True)]
    assert last.fail(first.keys, NoService("gone")) == Outcome()
    assert [whose for _, whose, _ in answered(last, [second]).sent] == [other]


def test_neighbours_of_another_vocabulary_end_that_row_alone() -> None:
    last = new()
    keys = [start(last, n, 2, max_tokens=9, retrieve=Retrieval(index="i", k=3)) for n in (1, 2, 3)]
    (query,) = step(last, *[(key, 0, 2) for key in keys]).queries
    answers = [neighbours(vector, 3) for vector in query.vectors]
    answers[1].following = np.full((3, 8), VOCAB, np.int32)
    outcome = last.answered(query, answers)
    assert [type(message) for message, _, _ in outcome.sent] == [Partial, Error, Partial]
    assert "outside the vocabulary" in outcome.sent[1][0].message and outcome.sent[1][1] == keys[1]
    assert Return(*keys[1], -1, True) in outcome.returns and len(last) == 2


def test_without_any_neighbour_the_model_speaks_alone() -> None:
    last = new()
    key = start(last, 1, 2, max_tokens=9, logprobs=True, retrieve=Retrieval(index="i", k=3))
    (query,) = step(last, (key, 0, 2)).queries
    none = Neighbours(np.full(3, np.inf, np.float32), np.full((3, 8), -1, np.int32), [])
    part = last.answered(query, [none]).sent[0][0].body
    assert part["token"] == int(lm(2).argmax()) and abs(math.exp(part["logprob"]) - lm(2).max()) < 1e-9


def test_a_parked_row_keeps_its_own_logits_alone() -> None:
    last = new()
    keys = [start(last, n, 2, retrieve=Retrieval(index="i")) for n in range(3)]
    step(last, *[(key, 0, 2) for key in keys])
    for key in keys:
        parked = last._sequences[key].parked
        assert parked is not None and parked[0].base is None and parked[0].shape == (VOCAB,)


def test_score_comes_in_chunks() -> None:
    last = new()
    count = 2 * CHUNK + 50
    key = start(last, 1, count + 1, mode="score")
    outcome = step(last, (key, 0, count))
    *parts, final = [message for message, _, _ in outcome.sent]
    assert [number for _, _, number in outcome.sent] == [0, 1, 2, 0]
    assert [part.body["position"] for part in parts] == [0, CHUNK, 2 * CHUNK]
    assert np.array_equal(np.concatenate([part.tensors[0] for part in parts]), ENTERED[:count].numpy())
    targets = np.arange(1, count + 1) % VOCAB
    wanted = [math.log(lm(place + 1)[target]) for place, target in enumerate(targets)]
    assert np.allclose(np.concatenate([part.tensors[1] for part in parts]), wanted, atol=1e-6)
    info = {"fingerprint": "print", "d": D, "context": CONTEXT, "vocab": VOCAB}
    assert final == Final({"count": count, **info})
    assert outcome.returns == [Return(*key, -1, True)] and len(last) == 0
