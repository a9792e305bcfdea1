"""Passages before the prompt, anew each stride: against a loop by hand over plain generation; losses; what fits."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.client.client import Client
from ralmq.client.results import Token
from ralmq.errors import NoService, RalmqError, Refused
from ralmq.workers.base import Worker
from ralmq.workers.datastore.build import build_datastore
from ralmq.workers.datastore.sources import Document
from ralmq.workers.generator.context import TEMPLATE, Context, Strides, text_of
from ralmq.workers.generator.options import Options
from ralmq.workers.generator.worker import Generator
from ralmq.workers.search.worker import Index
from ralmq.workers.stage.worker import Stage
from ralmq.workers.texts.files import build_text
from stage.pipelines import MODEL, Cluster, cluster, lm, stages
from tokenizers import Tokenizer

PROMPT = "the quick brown fox"
EXACT = {"deterministic": 8}  # so that what is computed again has the same bits
TEXTS = [
    ("fox.txt", "the fox was brown, and the fox jumps. " * 3),
    ("dog.txt", "a lazy dog sleeps over the fence; the dog is quick. " * 3),
    ("far.txt", "naïve café, Zürich, señor; это проверка токенов " * 3),
]
CONTEXT = {"retrieve": "texts", "policy": "context", "k": 2, "query_tokens": 40}


def served(path: Path, body: Callable[[Cluster], Any], *more: Worker, **options: Any) -> None:
    async def main() -> None:
        async with cluster(*stages(path, 2, **options), Generator(model=str(path), name=MODEL), *more) as running:
            await body(running)
            await running.settled()

    asyncio.run(main())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("texts") / "texts"
    build_text(out, name="texts", documents=TEXTS, words=8, overlap=2)
    return out


async def told(client: Client, prompt: str | list[int] = PROMPT, **options: Any) -> tuple[list[Token], Any]:
    generation = client.generate(prompt, model=MODEL, deadline=60, **options)
    return [token async for token in generation], generation


async def by_hand(
    client: Client,
    tokenizer: Tokenizer,
    embed: Callable[[list[int]], Any] | None,
    tokens: int,
    stride: int,
    template: str = TEMPLATE,
) -> list[int]:
    """The loop of in-context retrieval, written out: search, put it before the prompt, generate a stride."""
    prompt, made = tokenizer.encode(PROMPT).ids, list[int]()
    head, _, rest = template.partition("{passages}")
    between, _, tail = rest.partition("{prompt}")
    while len(made) < tokens:
        asked = [*prompt, *made][-40:]
        query = tokenizer.decode(asked) if embed is None else await embed(asked)
        hits = await client.search("texts", query, k=2)
        passages = "\n\n".join(text_of(payload) for payload in hits.payloads[0] if payload)
        before = tokenizer.encode(head + passages + between).ids
        framed = [*before, *prompt, *tokenizer.encode(tail).ids]
        count = min(stride, tokens - len(made))
        body = {"max_tokens": count, "ignore_eos": True, "prompt": len(framed)}
        parts = client.stream(f"lm:{MODEL}", body, tensors=[np.array([*framed, *made], np.int32)])
        made += [part.body["token"] async for part in parts]
    return made


@pytest.mark.parametrize("stride", [1, 5, 64])
def test_it_is_the_loop_by_hand(model: Path, tokenizer: Tokenizer, texts: Path, stride: int) -> None:
    async def body(running: Cluster) -> None:
        template = "Read: {passages}\n-- {prompt} ->"
        for options in ({}, {"template": template}):
            wanted = await by_hand(running.client, tokenizer, None, 12, stride, **options)
            tokens, end = await told(
                running.client, max_tokens=12, stride=stride, ignore_eos=True, **options, **CONTEXT
            )
            assert [token.id for token in tokens if token.id >= 0] == wanted
            count = len(tokenizer.encode(PROMPT).ids)
            assert [token.position for token in tokens[:12]] == list(range(count, count + 12))
            assert end.finish_reason == "length"
            assert {name: end.usage[name] for name in ("prompt_tokens", "completion_tokens")} == {
                "prompt_tokens": count,
                "completion_tokens": 12,
            }
        plain, _ = await told(running.client, max_tokens=12, ignore_eos=True)
        assert [token.id for token in plain] != [token.id for token in tokens]

    served(model, body, Index(index=texts), **EXACT)


def test_a_datastore_is_asked_with_the_model_s_own_state(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also where generations fill the generator: it needs no credit of its own to encode."""

    async def body(running: Cluster) -> None:
        documents = [Document(name, text) for name, text in TEXTS]
        out = tmp_path / "texts"
        await build_datastore(
            running.client, model=MODEL, name="texts", documents=documents, tokenizer=tokenizer, out=out
        )
        await running.add(Index(index=out))

        async def embed(ids: list[int]) -> Any:
            parts = [part.tensors[0].numpy()[-1] async for part in lm(running.client, [*ids, 0], mode="score")]
            return np.array(parts[-1])

        wanted = await by_hand(running.client, tokenizer, embed, 10, 4)
        small = Generator(model=str(model), name=MODEL, capacity=2)
        await running.kill(running.hosts[2].worker)
        await running.add(small)
        many = await asyncio.gather(
            *[told(running.client, max_tokens=10, stride=4, ignore_eos=True, **CONTEXT) for _ in range(6)]
        )
        assert all([token.id for token in tokens if token.id >= 0] == wanted for tokens, _ in many)

    served(model, body, **EXACT)


def test_what_a_token_is_drawn_from_but_not_its_random_number_depends_on_passages(
    model: Path, tokenizer: Tokenizer, texts: Path
) -> None:
    """Sampled: as a pipeline draws whose positions count the client's tokens alone; each of n texts by itself."""
    sampled = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1}

    async def body(running: Cluster) -> None:
        client = running.client
        options = {"max_tokens": 12, "stride": 5, "ignore_eos": True, **CONTEXT, **sampled}
        tokens, end = await told(client, seed=9, n=3, **options)
        for index, seed in enumerate(end.usage["seeds"]):
            alone, _ = await told(client, seed=seed, **options)
            ids = [token.id for token in alone if token.id >= 0]
            assert ids == [token.id for token in tokens if token.index == index and token.id >= 0]
        # Passages that the model is not told of: the same logits at every length, so the same draws.
        prompt = tokenizer.encode(PROMPT).ids
        parts = [part.body async for part in lm(client, prompt, max_tokens=8, seed=9, context=3, **sampled)]
        assert [part["position"] for part in parts] == [len(prompt) - 3 + place for place in range(len(parts))]
        other = [part.body["token"] async for part in lm(client, prompt, max_tokens=8, seed=9, **sampled)]
        assert [part["token"] for part in parts] != other

    served(model, body, Index(index=texts), **EXACT)


def test_passages_come_with_the_first_token_of_each_stride(model: Path, texts: Path) -> None:
    async def body(running: Cluster) -> None:
        options = {"max_tokens": 11, "stride": 4, "ignore_eos": True, **CONTEXT}
        tokens, _ = await told(running.client, passages=True, **options)
        assert [bool(token.passages) for token in tokens[:11]] == [not place % 4 for place in range(11)]
        first = tokens[0].passages
        assert [set(passage) for passage in first] == [{"document", "start", "text", "id", "distance"}] * 2
        assert first[0]["document"] == "fox.txt" and first[0]["distance"] >= first[1]["distance"]
        without, _ = await told(running.client, **options)
        assert not any(token.passages for token in without)
        assert [token.id for token in without] == [token.id for token in tokens]

    served(model, body, Index(index=texts))


@pytest.mark.parametrize("lost", [Stage, Generator])
@pytest.mark.parametrize("at", [1, 4, 6, 11])
def test_a_loss_within_a_stride_changes_nothing(model: Path, texts: Path, at: int, lost: type[Worker]) -> None:
    """A stage, or the generator itself, lost once so many tokens are there; another one takes its place."""
    options = {"max_tokens": 12, "stride": 4, "ignore_eos": True, "temperature": 1.0, "seed": 3, **CONTEXT}

    async def body(running: Cluster) -> None:
        wanted, _ = await told(running.client, **options)
        generation = running.client.generate(PROMPT, model=MODEL, deadline=60, **options)
        found = []
        async for token in generation:
            found.append(token)
            if len(found) == at:
                await running.kill(next(host.worker for host in running.hosts if isinstance(host.worker, lost)))
                anew = [Generator(model=str(model), name=MODEL)] if lost is Generator else stages(model, 2, **EXACT)
                await running.add(*anew)
        assert found == wanted

    served(model, body, Index(index=texts), **EXACT)


def test_passages_are_cut_to_what_the_model_reads(model: Path, tokenizer: Tokenizer, texts: Path) -> None:
    """The context holds 256 tokens: a text ends where it would end without passages."""

    async def body(running: Cluster) -> None:
        for length in (20, 200, 240, 250, 255):
            prompt = np.random.default_rng(length).integers(3, 300, length).tolist()
            options = {"max_tokens": 40, "stride": 16, "ignore_eos": True}
            tokens, end = await told(running.client, prompt, **options, **{**CONTEXT, "k": 50})
            plain, _ = await told(running.client, prompt, **options)
            assert len([token for token in tokens if token.id >= 0]) == min(40, 256 - length)
            positions = [[token.position for token in some if token.id >= 0] for some in (tokens, plain)]
            assert positions[0] == positions[1]
            assert end.finish_reason == "length"
        with pytest.raises(Refused, match="the model's context holds 256: shorten it"):
            await told(running.client, list(range(256)), **CONTEXT)

    served(model, body, Index(index=texts))


class Found:
    """An index that notes what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, list[tuple[list[int], str]]()

    async def __call__(self, ids: Sequence[int], text: str) -> list[dict[str, Any]]:
        self.asked.append((list(ids), text))
        return [{"text": text, "id": place, "distance": 0.0} for place, text in enumerate(self.texts)]


def test_frames(tokenizer: Tokenizer) -> None:
    """Special tokens stay in front; a frame holds for its stride; what does not fit is left out."""

    async def main() -> None:
        prompt = tokenizer.encode(PROMPT).ids
        found = Found("one two", "", "three")

        def context(room: int, template: str = "A{passages}B{prompt}C") -> Context:
            return Context(found, Strides(4, 3, template, 10, room, True), tokenizer, prompt)

        def ids(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        whole = context(400)
        frame = await whole.frame([])
        before = ids("Aone two\n\nthreeB")
        assert frame.around(prompt) == [*before, *prompt, *ids("C")]
        assert (frame.begin, frame.until, frame.last, frame.size) == (0, 4, False, len(before) + 1)
        assert [passage["text"] for passage in frame.passages] == ["one two", "three"]
        assert await whole.frame([7, 8]) is frame and found.asked == [(prompt[-3:], tokenizer.decode(prompt[-3:]))]
        later = await whole.frame([7, 8, 9, 10, 11])
        assert (later.begin, later.until, later.last) == (4, 8, False) and found.asked[1][0] == [8, 9, 10]
        later = await whole.frame(list(range(8)))
        assert (later.until, later.last) == (10, True)
        tight = await context(len(prompt) + 4 + len(before)).frame([])
        assert tight.around(prompt) == [*ids("Aone twoB"), *prompt, *ids("C")] and len(tight.passages) == 1
        cut = await context(len(prompt) + 4 + 3 + 2).frame([])
        assert cut.around(prompt) == [*ids("A"), *ids("one two")[:2], *ids("B"), *prompt, *ids("C")]
        asked = len(found.asked)
        none = await context(len(prompt) + 4 + 3).frame([])
        assert none.around(prompt) == prompt and none.until == 4 and len(found.asked) == asked
        full = await context(len(prompt) + 2).frame([])
        assert full.around(prompt) == prompt and full.until == 2 and full.last

    asyncio.run(main())


def test_the_begin_of_a_text_stays_in_front(tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    begun = Tokenizer.from_str(tokenizer.to_str())
    begun.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])

    async def main() -> None:
        for prompt, start in (([1, 50, 51], 1), ([50, 51], 0), ([1], 0), ([1, 2, 60], 2)):
            frame = await Context(Found("x"), Strides(4, 3, TEMPLATE, 4, 99, False), begun, prompt).frame([])
            assert frame.around(prompt)[:start] == prompt[:start] and frame.size and not frame.passages
            assert frame.around(prompt) == [*prompt[:start], *frame.before, *prompt[start:]]

    asyncio.run(main())


def test_texts_of_payloads() -> None:
    assert text_of({"text": " a b "}) == "a b" and text_of({"context": "a", "continuation": " b"}) == "a b"
    for payload in ({}, {"tokens": [1]}, {"text": 5}, {"context": "a"}):
        with pytest.raises(Refused, match="gives no text of its passages"):
            text_of(payload)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "context"}, "policy=context without retrieve: name the index"),
        ({"policy": "magic", "retrieve": "i"}, "policy: Input should be 'knn', 'ngram', 'knn.ngram', 'context' or "),
        ({"retrieve": "i", "stride": 4}, "stride belongs to policy context, not to knn: leave it out"),
        ({"retrieve": "i", "policy": "context", "interval": 4}, "interval belongs to policy knn or ngram or knn.ngram"),
        ({"retrieve": "i", "policy": "ngram", "k": 4}, "k belongs to policy knn or knn.ngram or context or encdec"),
        ({"retrieve": "i", "policy": "ngram", "knn_lambda": 0.5}, "knn_lambda belongs to policy knn or knn.ngram"),
        ({"retrieve": "i", "policy": "context", "stride": 0}, "stride: "),
        ({"retrieve": "i", "policy": "ngram", "order": 1}, "order: "),
        ({"retrieve": "i", "policy": "ngram", "order": 9}, "order: "),
        *[
            ({"retrieve": "i", "policy": "context", "template": template}, "template: give a text with {passages} once")
            for template in ("", "{prompt}", "{passages}", "{prompt} {passages}", "{passages}{passages}{prompt}")
        ],
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said.replace("{", r"\{").replace("}", r"\}")):
        Options.of({"prompt": "a", **options})


def test_shares_of_more_than_all_are_refused() -> None:
    options = Options.of({"retrieve": "i", "policy": "knn+ngram", "knn_lambda": 0.8, "ngram_lambda": 0.3})
    with pytest.raises(Refused, match=r"^knn_lambda=0.8 and ngram_lambda=0.3 are more than 1 together: lower one"):
        options.tasks()


def test_what_an_index_cannot_do_is_said(model: Path, texts: Path) -> None:
    async def body(running: Cluster) -> None:
        wrong: list[tuple[dict[str, Any], type[RalmqError], str]] = [
            (
                {"policy": "knn"},
                Refused,
                "index texts is no datastore of a model's states: ask for it with policy=context",
            ),
            ({"policy": "ngram"}, Refused, "index texts is no datastore"),
            ({"policy": "context", "retrieve": "nowhere"}, NoService, "no worker offers search:nowhere"),
        ]
        for options, kind, said in wrong:
            with pytest.raises(kind, match=said):
                await told(running.client, **{"retrieve": "texts", **options})

    served(model, body, Index(index=texts))


def test_an_index_that_is_lost_is_waited_for(model: Path, texts: Path) -> None:
    options = {"max_tokens": 12, "stride": 4, "ignore_eos": True, **CONTEXT}

    async def body(running: Cluster) -> None:
        wanted, _ = await told(running.client, **options)
        index = running.hosts[3].worker
        generation = running.client.generate(PROMPT, model=MODEL, deadline=60, **options)
        found = [await anext(generation)]
        await running.kill(index)
        rest = asyncio.create_task(_all(generation))
        await asyncio.sleep(0.2)
        await running.add(Index(index=texts))
        assert [*found, *await rest] == wanted

    served(model, body, Index(index=texts), **EXACT)


async def _all(generation: Any) -> list[Token]:
    return [token async for token in generation]
