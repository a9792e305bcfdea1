"""The policies ngram and knn+ngram at the last stage, against the offline table and counting by hand."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from ralmq.errors import Refused, WorkerFailed
from ralmq.schema.message import Error, Partial, Return
from ralmq.schema.tensor import tensor_of
from ralmq.workers.datastore.ngram import Trigram
from ralmq.workers.index.stream import TokenStream
from ralmq.workers.index.writer import write_index
from ralmq.workers.params import Retrieval, Task
from ralmq.workers.stage.neighbours import Query
from ralmq.workers.stage.ngrams import NgramQuery, context_of
from stage.pipelines import Cluster, Watched, cluster, generated, prompts, scored, stages
from stage.table import NGRAMS, STREAM, VOCAB, answered, found, key_of, knn, lm, new, run, start, step


def witten_bell(stream: TokenStream, history: list[int], vocab: int, ahead: int = 0) -> np.ndarray:
    """The definition, counted by hand: p [vocab] behind these tokens; unigrams do not look ahead."""
    if not history:
        counts = Counter(stream.tokens.tolist())
        lower = np.full(vocab, 1 / vocab)
    else:
        counts, lower = Counter(), witten_bell(stream, history[1:], vocab, ahead)
        for begin, end in zip(stream.starts, stream.ends, strict=True):
            line = stream.tokens[begin:end].tolist()
            for place in range(len(line) - len(history) - ahead):
                if line[place : place + len(history)] == history:
                    counts[line[place + len(history) + ahead]] += 1
    if not counts:
        return lower
    p = len(counts) * lower
    for token, count in counts.items():
        p[token] += count
    return p / (sum(counts.values()) + len(counts))


def tokens_of(prompt: int, parts: list[dict[str, Any]]) -> list[int]:
    return [*(np.arange(prompt) % VOCAB).tolist(), *[part["token"] for part in parts]]


@pytest.mark.parametrize(("interval", "weight"), [(1, 0.4), (3, 1.0)])
def test_trigrams_are_those_of_the_offline_table(interval: int, weight: float) -> None:
    table = Trigram.fit(STREAM.tokens, VOCAB, STREAM.starts)
    retrieval = Retrieval(index="i", policy="ngram", ngram_lambda=weight, interval=interval)
    for prompt in (1, 2, 7):
        last = new()
        options = {"logprobs": True, "temperature": 1.0, "seed": prompt, "retrieve": retrieval}
        parts, queries, _ = run(last, start(last, 1, prompt, max_tokens=50, **options), prompt)
        assert len(queries) == math.ceil(50 / interval)
        assert queries[0].body == {"ngram": 3}
        assert {str(query.body) for query in queries[1:]} == {"{'ngram': 3, 'known': 'stream'}"}
        tokens = tokens_of(prompt, parts)
        for place, part in enumerate(parts):
            p = lm(prompt + place)[part["token"]]
            if not place % interval:
                context = context_of(np.array(tokens, np.int32), prompt + place, 3)
                p = weight * table.probability(context[None], np.array([part["token"]]))[0] + (1 - weight) * p
            assert abs(math.exp(part["logprob"]) - p) < 1e-6


@pytest.mark.parametrize("order", [2, 3, 5, 8])
@pytest.mark.parametrize("staleness", [0, 1, 7])
def test_any_order_and_staleness_follow_the_definition(order: int, staleness: int) -> None:
    retrieval = Retrieval(index="i", policy="ngram", ngram_lambda=0.7, order=order, staleness=staleness, interval=2)
    last = new()
    key = start(last, 1, 4, max_tokens=40, logprobs=True, temperature=1.0, seed=2, retrieve=retrieval)
    parts, queries, _ = run(last, key, 4)
    assert len(queries) == math.ceil((40 - staleness) / 2)
    tokens = tokens_of(4, parts)
    for place, part in enumerate(parts):
        p = lm(4 + place)
        if place >= staleness and not (place - staleness) % 2:
            known = 4 + place - staleness
            p = 0.7 * witten_bell(STREAM, tokens[max(0, known - order + 1) : known], VOCAB, staleness) + 0.3 * p
        assert abs(math.exp(part["logprob"]) - p[part["token"]]) < 1e-6


@pytest.mark.parametrize("staleness", [0, 2])
def test_both_are_mixed_by_their_weights(staleness: int) -> None:
    """p = 0.3 p_knn + 0.5 p_ngram + 0.2 p_lm; a request for each part at each position."""
    retrieval = Retrieval(
        index="i",
        policy="knn+ngram",
        k=6,
        knn_lambda=0.3,
        ngram_lambda=0.5,
        knn_temperature=7.0,
        interval=3,
        staleness=staleness,
    )
    last = new()
    key = start(last, 1, 5, "ip", max_tokens=40, logprobs=True, temperature=1.0, seed=2, retrieve=retrieval)
    parts, queries, _ = run(last, key, 5)
    count = math.ceil((40 - staleness) / 3)
    assert [type(query) for query in queries] == [Query, NgramQuery] * count
    tokens = tokens_of(5, parts)
    for place, part in enumerate(parts):
        p = lm(5 + place)
        if place >= staleness and not (place - staleness) % 3:
            asked = 5 + place - staleness
            counts = witten_bell(STREAM, tokens[max(0, asked - 2) : asked], VOCAB, staleness)
            p = 0.3 * knn(asked, 6, 7.0, staleness, "ip") + 0.5 * counts + 0.2 * p
        assert abs(math.exp(part["logprob"]) - p[part["token"]]) < 1e-6


def test_a_row_waits_for_both_parts_in_any_order() -> None:
    for reverse in (False, True):
        last = new()
        key = start(last, 1, 3, retrieve=Retrieval(index="i", policy="knn+ngram"))
        queries = step(last, (key, 0, 3)).queries
        assert len(queries) == 2
        first, second = reversed(queries) if reverse else queries
        outcome = answered(last, [first])
        assert not outcome.sent and not outcome.returns
        assert [type(message) for message, _, _ in answered(last, [second]).sent] == [Partial]


def test_rows_that_ask_alike_ask_together() -> None:
    last = new()
    same = [start(last, n, 3, retrieve=Retrieval(index="i", policy="ngram")) for n in range(3)]
    longer = start(last, 5, 3, retrieve=Retrieval(index="i", policy="ngram", order=5))
    both = start(last, 6, 3, retrieve=Retrieval(index="i", policy="knn+ngram"))
    queries = step(last, *[(key, 0, 3) for key in (*same, longer, both)]).queries
    assert [(type(query), query.keys) for query in queries] == [
        (NgramQuery, [*same, both]),
        (NgramQuery, [longer]),
        (Query, [both]),
    ]
    assert queries[1].tensors[0].tolist() == [[-1, 0, 1, 2]]


@pytest.mark.parametrize("staleness", [0, 3])
def test_a_replay_goes_on_as_the_unbroken_run_would(staleness: int) -> None:
    retrieval = Retrieval(index="i", policy="knn+ngram", interval=2, staleness=staleness, ngram_lambda=0.6)
    options = {"retrieve": retrieval, "temperature": 1.0, "seed": 11, "logprobs": True}
    last = new()
    whole, _, _ = run(last, start(last, 1, 6, max_tokens=24, **options), 6)
    tokens = tokens_of(6, whole)
    for cut in range(1, 24):
        again = new()
        task = Task(max_tokens=24 - cut, prompt=6, ignore_eos=True, **options)
        again.start(key_of(1), np.array(tokens[: 6 + cut], np.int32), {"task": packed(task), "limit": 24 - cut})
        parts, _, _ = run(again, key_of(1), 6 + cut)
        assert parts == whole[cut:]


def packed(task: Task) -> bytes:
    found: bytes = msgpack.packb(task.model_dump(exclude_defaults=True))
    return found


def test_tokens_of_another_vocabulary_end_that_row_alone() -> None:
    last = new()
    keys = [start(last, n, 2, max_tokens=9, retrieve=Retrieval(index="i", policy="ngram")) for n in (1, 2)]
    (query,) = step(last, *[(key, 0, 2) for key in keys]).queries
    answers = found(query)
    answers[0].levels[-1] = np.array([VOCAB], np.int32), np.array([3], np.int32)  # type: ignore[attr-defined]
    outcome = last.answered(query, answers)
    assert [type(message) for message, _, _ in outcome.sent] == [Error, Partial]
    assert "outside the vocabulary" in outcome.sent[0][0].message
    assert Return(*keys[0], -1, True) in outcome.returns and len(last) == 1


def test_a_reply_that_does_not_fit_is_no_answer() -> None:
    last = new()
    key = start(last, 1, 2, retrieve=Retrieval(index="i", policy="ngram"))
    (query,) = step(last, (key, 0, 2)).queries
    body, arrays = NGRAMS.answer(query.body, query.tensors)
    offsets, ids, counts, *unigrams = arrays
    wrong: list[tuple[dict[str, Any], list[Any]]] = [
        ({}, arrays),
        (body, arrays[:3]),
        (body, [offsets[:-1], ids, counts, *unigrams]),
        (body, [offsets[::-1], ids, counts, *unigrams]),
        (body, [offsets + 1, ids, counts, *unigrams]),
        (body, [offsets, ids, counts[:-1], *unigrams]),
        (body, [offsets, ids.astype(np.float32), counts, *unigrams]),
        (body, [offsets, ids, counts, unigrams[0], unigrams[1][:-1]]),
    ]
    for said, given in wrong:
        with pytest.raises(WorkerFailed, match="without n-grams"):
            query.answers(said, tuple(tensor_of(np.ascontiguousarray(array)) for array in given))


def test_shares_of_more_than_all_are_refused() -> None:
    body = {"retrieve": {"index": "i", "policy": "knn+ngram", "knn_lambda": 0.7, "ngram_lambda": 0.4}}
    with pytest.raises(Refused, match=r"knn_lambda=0.7 and ngram_lambda=0.4 are more than 1 together: lower one"):
        Task.of(body)
    body["retrieve"]["policy"] = "ngram"
    assert Task.of(body).retrieve is not None
    with pytest.raises(Refused, match="policy"):
        Task.of({"retrieve": {"index": "i", "policy": "context"}})


@pytest.mark.parametrize("shards", [1, 2])
def test_over_the_cluster_it_is_the_offline_table(
    shards: int, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A real index behind the real broker; several sequences at once, one of them with neighbours, too."""
    path, vocab = checkpoint("llama"), 128
    random = np.random.default_rng(4)
    tokens = (random.zipf(1.4, 900) % vocab).astype(np.int32)
    stream = TokenStream(tokens, ("a", "b", "c"), np.array([0, 300, 640]))
    entries = stream.entries()
    table = Trigram.fit(tokens, vocab, stream.starts)

    async def main() -> None:
        async with cluster(*stages(path, 2)) as running:
            info = await running.client.request("lm:m", {"mode": "score"}, tensors=[np.zeros(2, np.int32)])
            vectors = random.normal(size=(len(entries), info.body["d"])).astype(np.float32)
            write_index(
                tmp_path / "docs",
                name="docs",
                vectors=vectors,
                stream=stream,
                entries=entries,
                model="m",
                fingerprint=info.body["fingerprint"],
                shards=shards,
            )
            places = [f"{place}/{shards}" if shards > 1 else "" for place in range(shards)]
            await running.add(*[Watched(index=tmp_path / "docs", shard=place) for place in places])
            await equal(running)
            await running.settled()

    async def equal(running: Cluster) -> None:
        retrieve = {"index": "docs", "policy": "ngram", "ngram_lambda": 0.6, "interval": 2}
        options = {"max_tokens": 30, "logprobs": True, "temperature": 1.0, "retrieve": retrieve}
        asked = prompts(4, seed=5)
        both = {**retrieve, "policy": "knn+ngram", "knn_lambda": 0.2, "knn_temperature": 100.0}
        *answers, other = await asyncio.gather(
            *[generated(running.client, prompt, seed=n, **options) for n, prompt in enumerate(asked)],
            generated(running.client, asked[0], seed=9, **{**options, "retrieve": both}),
        )
        assert len(other.tokens) == 30
        for prompt, answer in zip(asked, answers, strict=True):
            whole = np.array(prompt + answer.tokens, np.int32)
            _, log_p = await scored(running.client, whole.tolist())
            for place, logprob in enumerate(answer.logprobs):
                position = len(prompt) + place
                p = math.exp(log_p[position - 1])
                if not place % 2:
                    context = context_of(whole, position, 3)
                    p = 0.6 * table.probability(context[None], whole[position : position + 1])[0] + 0.4 * p
                assert logprob is not None and abs(math.exp(logprob) - p) < 1e-6

    asyncio.run(main())
