"""Texts to a datastore and to held-out bits, with a stand-in that answers `score` as a stage does."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_scorer import Parts, Scorer, Spoil, reply
from ralmq.client.results import Reply
from ralmq.schema.errors import Busy, Refused, WorkerFailed, WorkerLost
from ralmq.workers.datastore import build as datastore
from ralmq.workers.datastore.build import build_datastore
from ralmq.workers.datastore.evaluate import evaluate_bits, model_bits, retrieve, score_held_out, trigram_bits
from ralmq.workers.datastore.ngram import Trigram
from ralmq.workers.datastore.score import ScoreError, describe, score
from ralmq.workers.datastore.sources import Document, SourceError
from ralmq.workers.datastore.tokenized import tokenize
from ralmq.workers.index.directory import OutputError
from ralmq.workers.index.query import Params
from ralmq.workers.index.store import open_index
from ralmq.workers.index.stream import TokenStream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

RNG = np.random.default_rng(5)
LENGTHS = (40, 1, 7, 16, 17, 0, 33)
IDS = [RNG.integers(0, 50, length).tolist() for length in LENGTHS]
DOCUMENTS = [Document(f"d{place}", " ".join(f"w{i}" for i in ids)) for place, ids in enumerate(IDS)]


def build(scorer: Scorer, words: Tokenizer, out: Path, **changed: Any) -> Any:
    given: dict[str, Any] = {"model": "tiny", "name": "docs", "documents": DOCUMENTS, "tokenizer": words, "out": out}
    return asyncio.run(build_datastore(scorer, **{**given, **changed}))


def test_every_token_is_an_entry_once(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    manifest = build(scorer, words, tmp_path / "docs", sources=["folder"])
    index = open_index(tmp_path / "docs")
    assert index.manifest == manifest
    assert (manifest.ntotal, manifest.dimension) == (sum(max(0, length - 1) for length in LENGTHS), 4)
    assert (manifest.model, manifest.fingerprint, manifest.sources) == ("tiny", "f" * 16, ("folder",))
    payloads = index.following(np.arange(manifest.ntotal))
    wanted = [
        [*ids[place + 1 : place + 9], *[-1] * (8 - len(ids[place + 1 : place + 9]))]
        for ids in IDS
        for place in range(len(ids) - 1)
    ]
    assert payloads.tolist() == wanted
    assert index.datastore is not None and index.datastore.tokenizer is not None
    assert index.datastore.tokenizer.to_str() == words.to_str()


@pytest.mark.parametrize(
    ("changed", "asked", "said"),
    [
        ({"factory": "IVF9x"}, 0, "no such index is served"),
        ({"shards": 2000}, 0, "2000 shards; give 1 to 1024"),
        ({"factory": "HNSW8", "shards": 2, "by": "list"}, 0, "has no lists to spread by"),
        ({"name": "two words"}, 0, "an index name is"),
        ({"factory": "IVF1000,Flat"}, 1, "1000 lists for 108 vectors"),
        ({"factory": "IVF8,PQ3"}, 1, "4 dimensions are no multiple of 3"),
        ({"factory": "IVF8,PQ2"}, 1, "needs 256 vectors"),
        ({"shards": 2, "by": "list"}, 1, "has no lists to spread by"),
        ({"shards": 500}, 1, "500 shards for 108 vectors"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_scored(
    changed: dict[str, Any], asked: int, said: str, scorer: Scorer, words: Tokenizer, tmp_path: Path
) -> None:
    """At most the model is asked once what it is."""
    with pytest.raises(OutputError, match=said):
        build(scorer, words, tmp_path / "docs", **changed)
    assert len(scorer.asked) == asked and list(tmp_path.iterdir()) == []


def test_keys_belong_to_their_entries(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    """The stand-in's key names its token, the token before, and the context it had: at least a quarter of a window."""
    stream = tokenize(DOCUMENTS, words).stream
    found = asyncio.run(score(scorer, model="tiny", stream=stream))
    row = 0
    for ids in IDS:
        for place in range(len(ids) - 1):
            token, before, context, _ = found.hidden[row].tolist()
            assert token == ids[place] and (place == 0 or before == ids[place - 1])
            assert context == place if place < 15 else 4 <= context <= 14
            assert found.logp[row] == np.float32(-(np.float32(ids[place + 1] + 1) / 10))
            assert found.targets[row] == ids[place + 1]
            assert found.contexts[row].tolist() == [ids[place - 1] if place else -1, ids[place]]
            row += 1
    assert row == len(found.entries)


def test_a_few_windows_are_in_flight(scorer: Scorer, words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tokenize(DOCUMENTS, words).stream
    real = Parts.__anext__

    async def slow(parts: Parts) -> Reply:
        await asyncio.sleep(0)
        return await real(parts)

    monkeypatch.setattr(Parts, "__anext__", slow)
    asyncio.run(score(scorer, model="tiny", stream=stream, in_flight=3))
    assert (scorer.most, scorer.now) == (3, 0)


def test_progress_counts_every_entry(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build(scorer, words, tmp_path / "docs", progress=lambda *step: told.append(step))
    scored = [done for stage, done, total in told if stage == "score" and total == 108]
    assert scored == sorted(scored) and scored[-1] == 108
    assert [told[0], told[1], told[-1]] == [("tokenize", 0, 1), ("tokenize", 1, 1), ("fill", 108, 108)]


def test_max_tokens_cuts_the_last_document(scorer: Scorer, words: Tokenizer) -> None:
    stream = tokenize(DOCUMENTS, words, 44).stream
    assert stream.names == ("d0", "d1", "d2") and len(stream.tokens) == 44
    assert stream.tokens.tolist() == [*IDS[0], *IDS[1], *IDS[2][:3]]
    for documents, most in (([], None), (DOCUMENTS[1:2], None), (DOCUMENTS, 1), (DOCUMENTS, 0)):
        with pytest.raises(SourceError, match="no document of two tokens"):
            tokenize(documents, words, most)


def test_no_special_token_enters_the_stream(words: Tokenizer) -> None:
    words.post_processor = processors.TemplateProcessing(single="w49 $A w48", special_tokens=[("w49", 49), ("w48", 48)])
    assert words.encode("w1 w2").ids == [49, 1, 2, 48]
    assert tokenize([Document("x", "w1 w2")], words).stream.tokens.tolist() == [1, 2]


def test_bytes_are_those_of_the_predicted_tokens() -> None:
    """A byte-level tokenizer over a text whose characters take one to four bytes: every byte is one token."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "a é \n€ 𝄞 end"
    whole = tokenize([Document("x", text), Document("y", " b")], tokenizer)
    assert len(whole.stream.tokens) == len(text.encode()) + 2
    assert whole.scored_bytes == len(text.encode()) - 1 + 1
    assert tokenize([Document("x", "abcdef")], tokenizer, 4).scored_bytes == 3


def drop(wanted: int) -> Spoil:
    return lambda part: None if part.body.get("position") == wanted else part


def body(**fields: Any) -> Spoil:
    return lambda part: reply({**part.body, **fields}) if "fingerprint" in part.body else part


def tensors(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]) -> Spoil:
    return lambda part: reply(part.body, *change(*(x.numpy() for x in part.tensors))) if part.tensors else part


def position(value: Any) -> Spoil:
    return lambda part: Reply({**part.body, "position": value}, part.tensors) if part.tensors else part


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop(0), "do not cover them"),
        (drop(5), "do not cover them"),
        (drop(10), "do not cover them"),
        (position(0), "position 0 twice"),
        (position([0]), "is no number"),
        (position(None), "is no number"),
        (tensors(lambda hidden, logp: (hidden,)), "1 tensors in a part"),
        (tensors(lambda hidden, logp: (hidden, logp[:-1])), "in a part"),
        (tensors(lambda hidden, logp: (hidden.astype(np.float64), logp)), "score sent float64"),
        (tensors(lambda hidden, logp: (hidden[:, :3].copy(), logp)), "keys of another width"),
        (tensors(lambda hidden, logp: (hidden * np.float32(np.nan), logp)), "not finite"),
        (tensors(lambda hidden, logp: (hidden, logp * np.float32(np.nan))), "not finite"),
        (lambda part: None if "fingerprint" in part.body else part, "summary that lacks"),
        (body(d=0), "summary that lacks"),
        (body(context=1), "summary that lacks"),
        (body(vocab=None), "summary that lacks"),
        (body(fingerprint=7), "summary that lacks"),
    ],
)
def test_answers_that_do_not_fit(scorer: Scorer, words: Tokenizer, tmp_path: Path, spoil: Spoil, said: str) -> None:
    honest = describe(scorer, "tiny")
    assert asyncio.run(honest).d == 4
    scorer.spoil = spoil
    with pytest.raises(ScoreError, match=said) as caught:
        build(scorer, words, tmp_path / "docs")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_on_the_way(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    def later(part: Reply) -> Reply:
        return reply({**part.body, "fingerprint": "g"}) if len(scorer.asked) > 4 and not part.tensors else part

    scorer.spoil = later
    with pytest.raises(ScoreError, match="became another model"):
        build(scorer, words, tmp_path / "docs")


def test_another_models_tokenizer(words: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="use that model's own tokenizer"):
        build(Scorer(vocab=20), words, tmp_path / "docs")


def test_a_clients_error_arrives_as_it_is(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    def fail(part: Reply) -> Reply:
        if len(scorer.asked) > 3:
            raise WorkerLost("gone")
        return part

    scorer.spoil = fail
    with pytest.raises(WorkerLost, match="gone"):
        build(scorer, words, tmp_path / "docs")
    assert scorer.now == 0


def test_a_busy_model_is_asked_again_by_the_client(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    """Each window may be sent again eight times; beyond that Busy ends the building, and nothing is left of it."""

    def always(part: Reply) -> Reply:
        raise Busy("full", retry_after=3.0)

    build(scorer, words, tmp_path / "docs")
    assert set(scorer.retries) == {8} and len(scorer.retries) == len(scorer.asked)
    scorer.spoil = always
    with pytest.raises(Busy):
        build(scorer, words, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_a_bad_name_or_place_is_refused_before_anything_is_asked(
    scorer: Scorer, words: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for changed in ({"out": tmp_path}, {"name": "a b"}):
        with pytest.raises(OutputError):
            build(scorer, words, **{"out": tmp_path / "docs", **changed})
    assert scorer.asked == []


def test_cancelled_while_it_writes(
    scorer: Scorer, words: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread cannot be killed: it is told to stop, awaited, and leaves nothing."""
    reached, go_on = threading.Event(), threading.Event()
    real = datastore.write_index

    def held(out: Path, *, progress: Any, **given: Any) -> Any:
        def told(*step: Any) -> None:
            reached.set()
            go_on.wait(10)
            progress(*step)

        return real(out, progress=told, **given)

    monkeypatch.setattr(datastore, "write_index", held)

    async def main() -> None:
        given: dict[str, Any] = {"model": "tiny", "name": "docs", "documents": DOCUMENTS, "tokenizer": words}
        task = asyncio.create_task(build_datastore(scorer, out=tmp_path / "docs", **given))
        assert await asyncio.to_thread(reached.wait, 10)
        assert len(list(tmp_path.iterdir())) == 1
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(tmp_path.iterdir()) == []

    asyncio.run(main())


def test_bits_over_an_index_of_the_same_text(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    """A store of the held-out text itself finds each position's own key at distance 0, so p_knn of the target is 1."""
    build(scorer, words, tmp_path / "docs")
    scorer.indexes["docs"] = open_index(tmp_path / "docs")

    async def main() -> None:
        held = await score_held_out(scorer, model="tiny", documents=DOCUMENTS, tokenizer=words)
        assert held.n_bytes == sum(len(document.text) - len(document.text.split(" ")[0]) for document in DOCUMENTS)
        p = np.exp(held.scored.logp.astype(np.float64))
        told: list[tuple[str, int, int]] = []
        found = await evaluate_bits(
            scorer, "docs", held, lam=0.25, temperature=1.0, k=1, progress=lambda *step: told.append(step)
        )
        assert told == [("search", 108, 108)]
        assert found.model == model_bits(held)
        assert found.model == pytest.approx(-np.log2(p).sum() / held.n_bytes, abs=1e-12)
        assert found.knn == pytest.approx(-np.log2(0.25 + 0.75 * p).sum() / held.n_bytes, abs=1e-12)
        assert found.shuffled > found.knn
        assert await evaluate_bits(scorer, "docs", held, lam=0.25, temperature=1.0, k=1, nprobe=4) == found
        assert scorer.searched[1] == {"k": 1, "following": True}
        assert scorer.searched[3] == {"k": 1, "following": True, "nprobe": 4}
        none = await evaluate_bits(scorer, "docs", held, lam=0.0, temperature=1.0, k=3)
        assert none.knn == none.shuffled == pytest.approx(found.model, abs=1e-12)
        table = Trigram.fit(held.scored.stream.tokens, 50, held.scored.stream.starts)
        p_table = table.probability(held.scored.contexts, held.scored.targets)
        wanted = -np.log2(0.25 * p_table + 0.75 * p).sum() / held.n_bytes
        assert trigram_bits(held, table, lam=0.25) == pytest.approx(wanted, abs=1e-12)

    asyncio.run(main())


def test_queries_are_asked_in_parts(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    build(scorer, words, tmp_path / "docs")
    index = scorer.indexes["docs"] = open_index(tmp_path / "docs")
    documents = [Document("long", " ".join(f"w{i}" for i in RNG.integers(0, 50, 600)))]

    async def main() -> None:
        held = await score_held_out(scorer, model="tiny", documents=documents, tokenizer=words)
        found = await retrieve(scorer, "docs", held, k=4)
        assert len(scorer.searched) == 1 + 3
        ids, distances = index.search(held.scored.hidden, Params(4))
        assert found.ids.tolist() == ids.tolist() and found.distances.tolist() == distances.tolist()
        assert found.values.tolist() == index.following(ids)[..., 0].tolist()

    asyncio.run(main())


def test_an_index_of_another_model_is_not_evaluated(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    build(scorer, words, tmp_path / "docs")
    scorer.indexes["docs"] = open_index(tmp_path / "docs")
    scorer.fingerprint = "g" * 16

    async def main() -> None:
        held = await score_held_out(scorer, model="tiny", documents=DOCUMENTS, tokenizer=words)
        with pytest.raises(Refused, match="the index docs was made by another model"):
            await retrieve(scorer, "docs", held)

    asyncio.run(main())


def test_an_answer_without_payloads_is_refused(scorer: Scorer, words: Tokenizer, tmp_path: Path) -> None:
    build(scorer, words, tmp_path / "docs")
    scorer.indexes["docs"] = open_index(tmp_path / "docs")
    real = scorer.request

    async def fewer(*given: Any, **named: Any) -> Reply:
        found = await real(*given, **named)
        return Reply(found.body, found.tensors[:2])

    scorer.request = fewer  # type: ignore[method-assign]

    async def main() -> None:
        held = await score_held_out(scorer, model="tiny", documents=DOCUMENTS, tokenizer=words)
        with pytest.raises(WorkerFailed, match="other arrays than ids"):
            await retrieve(scorer, "docs", held)

    asyncio.run(main())


def test_stream_without_entries_is_scored_to_nothing(scorer: Scorer) -> None:
    stream = TokenStream(np.array([3], np.int32), ("a",), np.array([0]))
    found = asyncio.run(score(scorer, model="tiny", stream=stream))
    assert found.hidden.shape == (0, 4) and found.targets.shape == (0,) and found.contexts.shape == (0, 2)
