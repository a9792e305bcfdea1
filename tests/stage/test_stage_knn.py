"""kNN-LM in the loop: a real index of a tiny model's own states, behind the real broker, against plain numpy."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ralmq.client.client import Client
from ralmq.errors import Busy, DeadlineExceeded, NoService, RalmqError, Refused
from ralmq.workers.datastore.build import build_datastore
from ralmq.workers.datastore.sources import Document
from ralmq.workers.index.query import Params
from ralmq.workers.index.store import open_index
from ralmq.workers.index.writer import write_index
from ralmq.workers.search.answer import MAX_PAYLOADS
from ralmq.workers.stage import neighbours, searches
from ralmq.workers.stage.last import PASSAGES
from ralmq.workers.stage.worker import Stage
from serving import until
from stage.offline import Offline
from stage.pipelines import Answered, Brake, Cluster, Watched, cluster, generated, lm, prompts, scored, stages
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel

FAMILY, VOCAB, D = "llama", 128, 64
PROMPT = prompts(1, seed=3)[0]
MARGIN = 1e-4
TEMPERATURE = 200.0  # squared distances between random states are in the hundreds


@pytest.fixture(scope="module")
def docs(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 documents of 300 random words each, scored by the model's own pipeline."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = np.random.default_rng(8).integers(3, VOCAB, (4, 300))
    documents = [Document(f"{n}.txt", " ".join(f"w{word}" for word in line)) for n, line in enumerate(words)]
    out = tmp_path_factory.mktemp("index") / "docs"

    async def main() -> None:
        async with cluster(*stages(checkpoint(FAMILY), 2)) as running:
            manifest = await build_datastore(
                running.client, model="m", name="docs", documents=documents, tokenizer=tokenizer, out=out
            )
            assert (manifest.dimension, manifest.ntotal) == (D, 4 * 299)

    asyncio.run(main())
    return out


def with_index(path: Path, docs: Path, body: Callable[[Cluster, Watched], Any], count: int = 2, **options: Any) -> None:
    """Runs `body` against a pipeline and an index, and sees to it that nothing of it is left behind."""

    async def main() -> None:
        index = Watched(index=docs)
        async with cluster(*stages(path, count, **options), index) as running:
            await body(running, index)
            index.gate.set()
            await running.settled()

    asyncio.run(main())


def knn(**options: Any) -> dict[str, Any]:
    """The retrieval of a task."""
    return {"index": "docs", "knn_temperature": TEMPERATURE, **options}


def test_an_interval_sends_exactly_so_many_vectors(checkpoint: Callable[[str], Path], docs: Path) -> None:
    """ceil(T / r) for each sequence, alone and among others; ceil((T - s) / r) with staleness s."""

    async def body(running: Cluster, index: Watched) -> None:
        for interval in (1, 3, 8):
            for tokens in (10, 64):
                index.asked.clear()
                await generated(running.client, PROMPT, max_tokens=tokens, retrieve=knn(interval=interval))
                assert index.vectors == math.ceil(tokens / interval) == len(index.asked)
                assert {vectors.shape for vectors in index.asked} == {(1, D)}
        for staleness in (1, 3):
            index.asked.clear()
            retrieve = knn(interval=3, staleness=staleness)
            await generated(running.client, PROMPT, max_tokens=64, retrieve=retrieve)
            assert index.vectors == math.ceil((64 - staleness) / 3)
        index.asked.clear()
        tasks = [(prompt, interval) for prompt in prompts(4, seed=6) for interval in (1, 3, 8)]
        await asyncio.gather(*[generated(running.client, p, max_tokens=10, retrieve=knn(interval=r)) for p, r in tasks])
        assert index.vectors == 4 * (10 + 4 + 2)
        assert len(index.asked) < index.vectors, "rows of one micro-batch ask together"

    with_index(checkpoint(FAMILY), docs, body)


def test_lambda_0_equals_plain_generation(checkpoint: Callable[[str], Path], docs: Path) -> None:
    async def body(running: Cluster, index: Watched) -> None:
        for sampling in (
            {},
            {"temperature": 0.9, "seed": 5},
            {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "seed": 6},
        ):
            options = {"max_tokens": 40, "logprobs": True, **sampling}
            plain = await generated(running.client, PROMPT, **options)
            mixed = await generated(running.client, PROMPT, retrieve=knn(knn_lambda=0.0), **options)
            assert mixed.tokens == plain.tokens
            assert np.allclose(mixed.logprobs, plain.logprobs, atol=1e-5)  # type: ignore[arg-type]
            other = await generated(running.client, PROMPT, retrieve=knn(knn_lambda=0.9), **options)
            assert other.tokens != plain.tokens
        assert index.vectors == 6 * 40

    with_index(checkpoint(FAMILY), docs, body)


async def keys_of(client: Client, docs: Path) -> np.ndarray:
    """The states that the index must hold, from mode score over its own documents."""
    datastore = open_index(docs).datastore
    assert datastore is not None
    stream = datastore.stream
    lines = [stream.tokens[a:b].tolist() for a, b in zip(stream.starts, stream.ends, strict=True)]
    parts = [await scored(client, line[:250]) for line in lines]
    return np.concatenate([hidden for hidden, _ in parts])


@pytest.mark.parametrize(("interval", "staleness"), [(1, 0), (3, 0), (1, 1), (1, 3), (4, 3)])
def test_mixing_equals_a_reference_in_numpy(
    interval: int,
    staleness: int,
    checkpoint: Callable[[str], Path],
    docs: Path,
    oracle: Callable[[str], PreTrainedModel],
) -> None:
    """p of each chosen token within 1e-6, from the states and log p that mode score gives for the finished text."""
    k, weight, tokens = 8, 0.4, 40
    results: list[tuple[Answered, np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]] = []

    async def body(running: Cluster, index: Watched) -> None:
        retrieve = knn(k=k, interval=interval, staleness=staleness, knn_lambda=weight)
        answer = await generated(running.client, PROMPT, max_tokens=tokens, logprobs=True, retrieve=retrieve)
        hidden, log_p = await scored(running.client, PROMPT + answer.tokens)
        results.append((answer, hidden, log_p, list(index.asked), await keys_of(running.client, docs)))

    with_index(checkpoint(FAMILY), docs, body, count=3)
    ((answer, hidden, log_p, asked, keys),) = results
    offline = Offline(docs, VOCAB, TEMPERATURE)
    stored = offline.keys.reshape(4, 299, D)[:, :249].reshape(-1, D)
    assert np.allclose(stored, keys, atol=1e-4), "the index holds states of mode score"
    begin, vectors = len(PROMPT) - 1, np.concatenate(asked)
    assert len(vectors) == math.ceil((tokens - staleness) / interval)
    sent = hidden[begin : begin + tokens - staleness : interval]
    assert np.allclose(vectors, sent, atol=1e-4), "a query is the state that mode score gives"
    settings = {"k": k, "interval": interval, "staleness": staleness, "knn_lambda": weight}
    assert max(offline.errors(answer.tokens, answer.logprobs, log_p[begin:], vectors, settings)) < 1e-6
    with torch.inference_mode():
        logits = oracle(FAMILY)(torch.tensor([PROMPT + answer.tokens])).logits[0, begin:-1].double()
    for place, (token, p) in enumerate(zip(answer.tokens, logits.softmax(-1).numpy(), strict=True)):
        if place >= staleness and not (place - staleness) % interval:
            query = vectors[(place - staleness) // interval]
            p = weight * offline.p(query, k, staleness) + (1 - weight) * p
        second, first = np.sort(p)[-2:]
        assert first - second < MARGIN or int(p.argmax()) == token


def test_rows_that_wait_for_neighbours_do_not_stop_the_others(checkpoint: Callable[[str], Path], docs: Path) -> None:
    """While the index answers nobody, others generate to their end beside the parked rows, and new ones begin."""

    async def body(running: Cluster, index: Watched) -> None:
        index.gate.clear()
        waiting = [asyncio.create_task(generated(running.client, p, max_tokens=9, retrieve=knn())) for p in prompts(3)]
        await until(lambda: index.vectors == 3)
        others = await asyncio.gather(*[generated(running.client, p, max_tokens=30) for p in prompts(5, seed=7)])
        assert [len(other.tokens) for other in others] == [30] * 5
        assert not any(task.done() for task in waiting) and index.vectors == 3
        index.gate.set()
        assert [len(answer.tokens) for answer in await asyncio.gather(*waiting)] == [9] * 3
        assert index.vectors == 27

    with_index(checkpoint(FAMILY), docs, body)


def test_a_row_whose_time_is_up_leaves_those_that_asked_with_it(checkpoint: Callable[[str], Path], docs: Path) -> None:
    """Two rows of one query: the index answers when the deadline of the first has passed."""

    async def body(running: Cluster, index: Watched) -> None:
        leader = running.hosts[0].worker
        assert isinstance(leader, Stage)
        brake = Brake(leader)  # so that both prompts are in one micro-batch
        blockers = [asyncio.create_task(generated(running.client, [5], max_tokens=1)) for _ in range(2)]
        await until(lambda: leader._leader is not None and leader._leader.flying == 2)
        index.gate.clear()
        short = asyncio.create_task(generated(running.client, PROMPT, max_tokens=9, deadline=2.0, retrieve=knn()))
        long = asyncio.create_task(generated(running.client, PROMPT, max_tokens=9, retrieve=knn()))
        await until(lambda: leader._leader is not None and len(leader._leader) == 4)
        brake.release()
        await asyncio.gather(*blockers)
        await until(lambda: index.vectors == 2)
        assert len(index.asked) == 1
        await asyncio.wait([short])
        assert isinstance(short.exception(), DeadlineExceeded)
        await asyncio.sleep(0.2)  # longer than an error of the index would take
        index.gate.set()
        assert len((await long).tokens) == 9

    with_index(checkpoint(FAMILY), docs, body)


@pytest.mark.parametrize("busy", [False, True])
def test_an_index_that_is_away_for_long_is_asked_again(
    busy: bool, checkpoint: Callable[[str], Path], docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For more than the time of any one request; once its rows are over nobody asks any more."""
    monkeypatch.setattr(neighbours, "ATTEMPT", 0.05)

    async def body(running: Cluster, index: Watched) -> None:
        last = running.hosts[1].worker
        assert isinstance(last, Stage)
        tries = 0
        asked = searches._asked

        async def counted(client: Client, query: Any) -> Any:
            nonlocal tries
            tries += 1
            if busy and tries < 4:
                raise Busy("its queue is full")
            return await asked(client, query)

        monkeypatch.setattr(searches, "_asked", counted)
        index.gate.clear()
        text = asyncio.create_task(generated(running.client, PROMPT, max_tokens=3, retrieve=knn()))
        await until(lambda: tries >= 4)
        assert not text.done()
        index.gate.set()
        assert len((await text).tokens) == 3
        index.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await generated(running.client, PROMPT, max_tokens=3, retrieve=knn(), deadline=0.5)
        left = lm(running.client, PROMPT, max_tokens=3, ignore_eos=True, retrieve=knn())
        before = tries
        await until(lambda: tries > before + 1)
        await left.aclose()
        await until(lambda: not last._searches, "the end of its search")

    with_index(checkpoint(FAMILY), docs, body)


def test_staleness_hides_the_wait(checkpoint: Callable[[str], Path], docs: Path) -> None:
    """With staleness 3 three more tokens come before the first answer is needed."""

    async def body(running: Cluster, index: Watched) -> None:
        for staleness in (0, 1, 3):
            index.gate.clear()
            stream = lm(running.client, PROMPT, max_tokens=9, ignore_eos=True, retrieve=knn(staleness=staleness))
            for _ in range(staleness):
                await anext(stream)
            following = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.1)
            assert not following.done()
            index.gate.set()
            await following
            assert len([part async for part in stream]) == 9 - staleness - 1

    with_index(checkpoint(FAMILY), docs, body)


def test_passages_tell_where_neighbours_stand(checkpoint: Callable[[str], Path], docs: Path) -> None:
    async def body(running: Cluster, index: Watched) -> None:
        assert PASSAGES == MAX_PAYLOADS
        retrieve = knn(k=4, interval=2, passages=True)
        stream = lm(running.client, PROMPT, max_tokens=5, ignore_eos=True, retrieve=retrieve)
        bodies = [part.body async for part in stream]
        opened = open_index(docs)
        for place, body in enumerate(bodies):
            assert ("passages" in body) == (place % 2 == 0)
            if place % 2 == 0:
                ids, distances = opened.search(index.asked[place // 2], Params(4))
                assert [passage["id"] for passage in body["passages"]] == ids[0].tolist()
                assert np.allclose([passage["distance"] for passage in body["passages"]], distances[0])
                wanted = [p.tokens.tolist() for p in opened.passages(ids[0]) if p is not None]
                assert [passage["tokens"] for passage in body["passages"]] == wanted
                texts = [" ".join(f"w{token}" for token in tokens) for tokens in wanted]
                assert [p["context"] + p["continuation"] for p in body["passages"]] == texts

    with_index(checkpoint(FAMILY), docs, body)


def test_an_answer_that_comes_after_the_cancel_is_dropped(checkpoint: Callable[[str], Path], docs: Path) -> None:
    async def body(running: Cluster, index: Watched) -> None:
        index.gate.clear()
        stream = lm(running.client, PROMPT, max_tokens=9, retrieve=knn())
        first = asyncio.ensure_future(anext(stream))
        other = asyncio.create_task(generated(running.client, PROMPT, max_tokens=9, retrieve=knn()))
        await until(lambda: index.vectors == 2)
        await stream.aclose()
        await asyncio.wait([first])
        assert first.exception() is not None
        last = running.hosts[1].worker
        await until(lambda: len(last._runner.last) == 1)  # type: ignore[attr-defined]
        index.gate.set()
        assert len((await other).tokens) == 9 and index.vectors == 10

    with_index(checkpoint(FAMILY), docs, body)


def test_a_foreign_index_is_refused_before_any_computation(
    checkpoint: Callable[[str], Path], docs: Path, tmp_path: Path
) -> None:
    """Another model's index of the same width, an index of another width, and a name that nobody serves."""
    opened = open_index(docs)
    assert opened.datastore is not None
    stream, entries = opened.datastore.stream, opened.datastore.stream.entries()
    same = opened.manifest.fingerprint
    for name, width, fingerprint in (("alien", D, "f" * 16), ("wide", D + 1, same)):
        vectors = np.zeros((len(entries), width), np.float32)
        write_index(
            tmp_path / name,
            name=name,
            vectors=vectors,
            stream=stream,
            entries=entries,
            model="other",
            fingerprint=fingerprint,
        )

    async def body(running: Cluster, index: Watched) -> None:
        await running.add(*[Watched(index=tmp_path / name) for name in ("alien", "wide")])
        wanted: dict[str, tuple[type[RalmqError], str]] = {
            "alien": (Refused, f"index alien was built with other .ffffffffffffffff, d={D}.*build it anew"),
            "wide": (Refused, f"d={D + 1}.*, not with this model"),
            "nobody": (NoService, "search:nobody"),
        }
        for name, (kind, said) in wanted.items():
            with pytest.raises(kind, match=said):
                await generated(running.client, PROMPT, retrieve=knn(index=name))
        assert [host.worker._runner.steps for host in running.hosts[:2]] == [0, 0]  # type: ignore[attr-defined]
        assert len((await generated(running.client, PROMPT, max_tokens=3, retrieve=knn())).tokens) == 3

    with_index(checkpoint(FAMILY), docs, body)
