"""An encoder-decoder over broker, encoder and stages: the tokens of transformers with the same chunks; runs counted."""

import asyncio
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.t5_models import greedy, states_of, t5
from ralmq.client.client import Client
from ralmq.errors import RalmqError, Refused
from ralmq.workers.base import Worker
from ralmq.workers.encoder import states
from ralmq.workers.encoder.states import StateEncoder
from ralmq.workers.encoder.worker import Encoder
from ralmq.workers.generator.worker import Generator
from ralmq.workers.search.worker import Index
from ralmq.workers.stage.worker import Stage
from ralmq.workers.texts.files import build_text
from stage.pipelines import MODEL, Cluster, cluster, stages
from tokenizers import Tokenizer, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

PROMPT = "the quick brown fox"
TEXTS = [
    ("fox.txt", "the fox was brown, and the fox jumps. " * 3),
    ("dog.txt", "a lazy dog sleeps over the fence; the dog is quick. " * 3),
    ("far.txt", "naïve café, Zürich, señor; это проверка токенов " * 3),
]
QUERY = 12  # tokens
T5Model = tuple[Path, PreTrainedModel, Tokenizer]


@pytest.fixture(scope="module")
def models(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], T5Model]:
    """A tiny T5 of a kind; its tokenizer ends each text, as that of T5 does."""
    made: dict[str, T5Model] = {}
    ending = Tokenizer.from_str(tokenizer.to_str())
    ending.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])

    def of(kind: str) -> T5Model:
        if kind not in made:
            path = tmp_path_factory.mktemp("t5") / kind
            t5(kind, path, vocab_size=tokenizer.get_vocab_size(), eos_token_id=2, seed=1)
            ending.save(str(path / "tokenizer.json"))
            oracle = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32).eval()
            made[kind] = path, oracle, ending
        return made[kind]

    return of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("texts") / "texts"
    build_text(out, name="texts", documents=TEXTS, words=8, overlap=2)
    return out


def served(path: Path, count: int, body: Callable[[Cluster], Any], *more: Worker, **options: Any) -> None:
    async def main() -> None:
        first = StateEncoder(model=str(path), name=MODEL)
        generator = Generator(model=str(path), name=MODEL)
        async with cluster(first, *stages(path, count, **options), generator, *more) as running:
            await body(running)
            await running.settled()

    asyncio.run(main())


async def told(client: Client, prompt: str | list[int] = PROMPT, **options: Any) -> list[int]:
    options = {"policy": "encdec", "ignore_eos": True, **options}
    return [token.id async for token in client.generate(prompt, model=MODEL, deadline=60, **options) if token.id >= 0]


async def gauge(running: Cluster, name: str) -> int:
    """As of the last BEAT of whoever has it."""
    await asyncio.sleep(0.15)
    return next(int(gauges[name]) for gauges in await running.gauges() if name in gauges)


async def by_hand(
    client: Client, model: T5Model, tokens: int, interval: int, presence: float = 0.0
) -> tuple[list[int], list[list[str]]]:
    """The loop of the policy with transformers; also what was retrieved each time."""
    _, oracle, tokenizer = model
    prompt, made, found = tokenizer.encode(PROMPT, add_special_tokens=False).ids, list[int](), list[list[str]]()
    while len(made) < tokens:
        query = tokenizer.decode([*prompt, *made][-QUERY:])
        hits = await client.search("texts", query, k=2)
        found.append([payload["text"].strip() for payload in hits.payloads[0] if payload])
        states = states_of(oracle, [tokenizer.encode(text).ids for text in found[-1] or [""]])
        count = min(interval, tokens - len(made))
        made += greedy(oracle, states, [0, *prompt, *made], count, presence, 1 + len(prompt))
    return made, found


@pytest.mark.parametrize("kind", ["v1.0", "v1.1"])
@pytest.mark.parametrize("count", [1, 2])
def test_tokens_are_those_of_transformers_with_the_same_chunks(
    models: Callable[[str], T5Model], texts: Path, kind: str, count: int
) -> None:
    model = models(kind)

    async def body(running: Cluster) -> None:
        runs, all_of_them = 0, set[tuple[int, ...]]()
        for tokens, interval in ((20, 8), (16, 8), (7, 64), (6, 1)):
            wanted, found = await by_hand(running.client, model, tokens, interval)
            options = {"retrieve": "texts", "interval": interval, "k": 2, "query_tokens": QUERY}
            assert await told(running.client, max_tokens=tokens, **options) == wanted
            assert len(found) == ceil(tokens / interval)
            runs += len(found)
            all_of_them |= {tuple(wanted[:6])}
            assert await gauge(running, "runs") == runs
        assert len(all_of_them) == 2 and len({token for tokens in all_of_them for token in tokens}) > 3

    served(model[0], count, body, Index(index=texts))


def test_penalties_and_positions_count_the_text_alone(models: Callable[[str], T5Model], texts: Path) -> None:
    """Neither states nor the decoder's first token are output, in the second interval as little as in the first."""
    model = models("v1.0")

    async def body(running: Cluster) -> None:
        options = {"retrieve": "texts", "interval": 5, "k": 2, "query_tokens": QUERY, "passages": True}
        for presence in (2.0, -2.0):
            wanted, found = await by_hand(running.client, model, 12, 5, presence)
            generation = running.client.generate(
                PROMPT,
                model=MODEL,
                policy="encdec",
                max_tokens=12,
                presence_penalty=presence,
                ignore_eos=True,
                **options,
            )
            tokens = [token async for token in generation if token.id >= 0]
            assert [token.id for token in tokens] == wanted
            count = generation.usage["prompt_tokens"]
            assert [token.position for token in tokens] == list(range(count, count + 12))
            shown = {at: [hit["text"].strip() for hit in token.passages] for at, token in enumerate(tokens)}
            assert {at: hits for at, hits in shown.items() if hits} == {
                5 * n: hits for n, hits in enumerate(found) if hits
            }

    served(model[0], 2, body, Index(index=texts))


def test_given_chunks_are_encoded_once(models: Callable[[str], T5Model]) -> None:
    """Texts or ids, greedy or drawn; the passages matter, and so does their order among several requests at once."""
    path, oracle, tokenizer = models("v1.1")
    chunks: list[Any] = [TEXTS[0][1], [5, 6, 7, 8], "a lazy dog"]
    ids = [tokenizer.encode(chunk).ids if isinstance(chunk, str) else chunk for chunk in chunks]

    async def body(running: Cluster) -> None:
        client = running.client
        for some in ([0, 1, 2], [2, 0], [1]):
            states = states_of(oracle, [ids[place] for place in some])
            wanted = greedy(oracle, states, [0, 9, 8, 7], 24)
            assert await told(client, [9, 8, 7], max_tokens=24, chunks=[chunks[place] for place in some]) == wanted
        assert await gauge(running, "runs") == 3 and await gauge(running, "chunks") == 6
        drawn = {"max_tokens": 24, "chunks": chunks[:1], "temperature": 1.0, "seed": 5}
        assert await told(client, **drawn) == await told(client, **drawn) != await told(client, **{**drawn, "seed": 6})

    served(path, 2, body)


def test_many_at_once_in_little_memory_share_what_is_equal_and_nothing_else(
    models: Callable[[str], T5Model],
) -> None:
    """States take KV blocks: sequences that get none give way to each other and are computed anew, states and all."""
    path, oracle, _ = models("v1.1")
    seeds = (0, 1, 2, 4, 5, 6, 7, 8)
    given = [[np.random.default_rng(seed).integers(3, 300, 60 + seed).tolist()] * 2 for seed in seeds]
    wanted = [greedy(oracle, states_of(oracle, chunks), [0, 9, 8, 7], 60) for chunks in given]

    async def body(running: Cluster) -> None:
        each = [told(running.client, [9, 8, 7], max_tokens=60, chunks=chunks) for chunks in given]
        assert await asyncio.gather(*each) == wanted
        assert await gauge(running, "preempted") > 0
        reused = await gauge(running, "reused_tokens")
        assert await told(running.client, [9, 8, 7], max_tokens=60, chunks=given[-1]) == wanted[-1]
        assert await gauge(running, "reused_tokens") > reused

    served(path, 2, body, kv_mib=1, chunk=32)


def test_a_lost_stage_changes_no_token_and_costs_no_run(models: Callable[[str], T5Model], texts: Path) -> None:
    model = models("v1.1")

    async def body(running: Cluster) -> None:
        wanted, found = await by_hand(running.client, model, 20, 8)
        options = {"retrieve": "texts", "interval": 8, "k": 2, "query_tokens": QUERY, "max_tokens": 20}
        made: list[int] = []
        generation = running.client.generate(PROMPT, model=MODEL, policy="encdec", ignore_eos=True, **options)
        async for token in generation:
            made += [token.id] if token.id >= 0 else []
            if len(made) == 11:
                behind = [host.worker for host in running.hosts if host.worker.span is not None][-1]
                await running.kill(behind)
                await running.add(Stage(model=str(model[0]), stage="1/2", name=MODEL))
        assert made == wanted
        assert await gauge(running, "runs") == len(found) == 3

    served(model[0], 2, body, Index(index=texts))


def test_what_does_not_go_together_is_refused_in_one_line(
    models: Callable[[str], T5Model], model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models("v1.0")[0]

    async def refused(client: Client, expected: str, **options: Any) -> None:
        with pytest.raises(Refused, match=expected) as caught:
            await told(client, [5, 6], max_tokens=2, **options)
        assert "\n" not in str(caught.value)

    async def crossed(running: Cluster) -> None:
        client = running.client
        await refused(client, "m is an encoder-decoder, for which policy=knn is not", retrieve="texts", policy="knn")
        await refused(client, "no chunks: m is an encoder-decoder, give policy=encdec", policy=None)
        await refused(client, "no chunks: policy=encdec needs retrieve=INDEX")
        await refused(client, "no chunks: give at least one", chunks=[])
        await refused(client, "chunks: .*of 0 to 311", chunks=[[312]])
        assert f"embed:{MODEL}" not in (await client.status())["services"]
        await refused(client, "interval is of what is retrieved", chunks=["a"], interval=4)
        await refused(client, "give policy=encdec and no index", chunks=["a"], policy="context", retrieve="texts")
        await refused(client, "stride belongs to policy context", retrieve="texts", stride=4)
        ids = np.zeros(3, np.int32)
        for body, given, expected in (
            ({}, [], "no chunks: m is an encoder-decoder, send its encoder's states"),
            ({}, [np.zeros((2, 5), np.float32)], r"are float32 \[2, 5\], m reads float32 \[n, 48\]"),
            ({}, [np.full((2, 48), np.nan, np.float32)], "not finite"),
            ({}, [np.zeros((8190, 48), np.float32)], "8190 encoder states and 3 tokens leave no"),
            ({"mode": "score"}, [], "scores no text"),
            ({"retrieve": {"index": "texts"}}, [], "policy=knn is not"),
        ):
            with pytest.raises(Refused, match=expected):
                await client.request(f"lm:{MODEL}", body, tensors=[ids, *given])
        for chunks in (None, [], "a", [[]], [1], [True]):
            with pytest.raises(Refused, match="chunks"):
                await client.request(f"encode:{MODEL}", {"chunks": chunks})
        reply = await client.request(f"encode:{MODEL}", {"chunks": ["the dog", [5, 6]]})
        assert sum(reply.body["lengths"]) == len(reply.tensors[0].numpy()) and reply.body["lengths"][1] == 2
        monkeypatch.setattr(states, "MAX_STATES", 4 * 48 * 7)
        with pytest.raises(Refused, match="they have 8 tokens, an answer holds the states of 7; give fewer"):
            await client.request(f"encode:{MODEL}", {"chunks": [[5, 6, 7, 8]] * 2})

    async def plain(running: Cluster) -> None:
        await refused(running.client, "m is a decoder-only model, policy=encdec needs an encoder-decoder", chunks=["a"])
        with pytest.raises(Refused, match="m is a decoder-only model, it reads no encoder states"):
            tensors = [np.zeros(3, np.int32), np.zeros((2, 64), np.float32)]
            await running.client.request(f"lm:{MODEL}", {}, tensors=tensors)

    async def others() -> None:
        async with cluster(*stages(model, 1), Generator(model=str(model), name=MODEL)) as running:
            await plain(running)

    served(path, 2, crossed, Index(index=texts))
    asyncio.run(others())


def test_the_wrong_directory_is_refused_at_the_start(models: Callable[[str], T5Model], model: Path) -> None:
    path = models("v1.0")[0]
    for worker, expected in (
        (StateEncoder(model=str(model)), "is a decoder-only model, it has no encoder"),
        (Encoder(model=str(path)), "start it as `ralmq worker t5-encoder`"),
        (Stage(model=str(path), stage="0/1", deterministic=4), "deterministic is of decoder-only models"),
    ):
        with pytest.raises(RalmqError, match=expected):
            asyncio.run(worker.start())
    with pytest.raises(Refused, match="tokens is too small: give at least 2"):
        StateEncoder(model=str(path), tokens=1)
