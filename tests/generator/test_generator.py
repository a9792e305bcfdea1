"""The worker `generator` over a real pipeline behind the real broker, in one process."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import cluster as in_process
from ralmq.client.client import Client
from ralmq.errors import NoService, RalmqError, Refused
from ralmq.workers.base import Request, Worker
from ralmq.workers.datastore.build import build_datastore
from ralmq.workers.datastore.sources import Document
from ralmq.workers.generator.worker import EMBEDDED, MAX_TEXTS, Generator
from ralmq.workers.index.query import Params
from ralmq.workers.index.store import open_index
from ralmq.workers.options import build
from ralmq.workers.registry import find
from ralmq.workers.search.worker import Index
from serving import until
from stage.pipelines import MODEL, Cluster, cluster, lm, scored, stages
from tokenizers import Tokenizer

PROMPT = "the quick brown"
SAMPLED = {"temperature": 1.0, "seed": 7, "ignore_eos": True}


def served(path: Path, body: Callable[[Cluster], Any]) -> None:
    async def main() -> None:
        async with cluster(*stages(path, 2), Generator(model=str(path), name=MODEL)) as running:
            await body(running)
            await running.settled()

    asyncio.run(main())


async def told(client: Client, prompt: str | list[int], **options: Any) -> tuple[str, list[Any], Any]:
    """Text, tokens with an id, and the finished generation."""
    generation = client.generate(prompt, model=MODEL, deadline=60, **options)
    tokens = [token async for token in generation]
    return "".join(token.text for token in tokens), [token for token in tokens if token.id >= 0], generation


def test_the_text_of_the_parts_is_the_text_of_the_tokens(model: Path, tokenizer: Tokenizer) -> None:
    async def body(running: Cluster) -> None:
        for seed in range(4):
            options = {**SAMPLED, "seed": seed, "max_tokens": 60}
            text, tokens, end = await told(running.client, PROMPT, **options)
            ids = tokenizer.encode(PROMPT).ids
            assert text == tokenizer.decode(ids + [token.id for token in tokens])[len(PROMPT) :]
            assert [token.position for token in tokens] == list(range(len(ids), len(ids) + 60))
            assert end.finish_reason == "length"
            assert end.usage == {"prompt_tokens": len(ids), "completion_tokens": 60, "seed": seed}
            again = await told(running.client, ids, **options)
            assert again[0] == text and again[1] == tokens, "token ids are a prompt, too"
        greedy = await told(running.client, PROMPT, max_tokens=8, ignore_eos=True)
        direct = [part.body["token"] async for part in lm(running.client, ids, max_tokens=8, ignore_eos=True)]
        assert [token.id for token in greedy[1]] == direct

    served(model, body)


def test_a_stop_string_ends_the_text_and_the_pipeline_s_work(model: Path, tokenizer: Tokenizer) -> None:
    """Any piece of the text that comes by itself, over the border of tokens or not, with others that overlap it."""

    async def body(running: Cluster) -> None:
        options = {**SAMPLED, "max_tokens": 120}
        text, tokens, _ = await told(running.client, PROMPT, **options)
        borders = 0
        for place in range(5, 45, 5):
            stop = text[place : place + 4]
            before, ids, end = await told(running.client, PROMPT, stop=[stop, stop + "x", stop[1:] + "y"], **options)
            assert before == text[: text.find(stop)] and end.finish_reason == "stop"
            assert end.usage["completion_tokens"] == len(ids) < 120
            assert [token.id for token in ids] == [token.id for token in tokens[: len(ids)]]
            borders += not any(stop in token.text for token in tokens)
            await until(lambda: idle(running), "the end of the pipeline's work")
        assert borders > 4, "most of these stop strings lie over a border"
        alone = await told(running.client, PROMPT, stop=text[9:14], **options)
        assert alone[0] == text[: text.find(text[9:14])]
        never = await told(running.client, PROMPT, stop=[text[-3:] + "never"], **options)
        assert never[0] == text, "what was held back comes at the end"

    async def idle(running: Cluster) -> bool:
        gauges = await running.gauges()
        return not any(entry["in_flight"] for entry in gauges) and not gauges[0]["sequences"]

    served(model, body)


def test_a_seed_is_told_and_repeats_the_text(model: Path) -> None:
    async def body(running: Cluster) -> None:
        drawn = [await told(running.client, PROMPT, max_tokens=20, temperature=1.0) for _ in range(3)]
        assert len({end.usage["seed"] for _, _, end in drawn}) == len({text for text, _, _ in drawn}) == 3
        for text, tokens, end in drawn:
            again = await told(running.client, PROMPT, max_tokens=20, temperature=1.0, seed=end.usage["seed"])
            assert again[:2] == (text, tokens)

    served(model, body)


def test_log_probabilities(model: Path, tokenizer: Tokenizer) -> None:
    async def body(running: Cluster) -> None:
        text, tokens, _ = await told(running.client, PROMPT, max_tokens=20, logprobs=True, **SAMPLED)
        ids = tokenizer.encode(PROMPT).ids
        _, log_p = await scored(running.client, ids + [token.id for token in tokens])
        assert np.allclose([token.logprob for token in tokens], log_p[len(ids) - 1 :], atol=1e-4)
        without = await told(running.client, PROMPT, max_tokens=20, **SAMPLED)
        assert without[0] == text and {token.logprob for token in without[1]} == {None}

    served(model, body)


def test_the_model_s_own_end_of_text(model: Path, tokenizer: Tokenizer) -> None:
    async def body(running: Cluster) -> None:
        for seed in range(200):
            text, tokens, end = await told(running.client, PROMPT, max_tokens=150, temperature=3.0, seed=seed)
            if end.finish_reason == "stop":
                assert tokens[-1].id == 2 and 2 not in [token.id for token in tokens[:-1]]
                assert "</s>" not in text and end.usage["completion_tokens"] == len(tokens)
                return
        raise AssertionError("no seed came upon the end of text")

    served(model, body)


def test_without_a_tokenizer_ids_serve(model: Path, tmp_path: Path) -> None:
    path = shutil.copytree(model, tmp_path / "bare")
    (path / "tokenizer.json").unlink()

    async def body(running: Cluster) -> None:
        text, tokens, end = await told(running.client, [5, 6, 7], max_tokens=6, ignore_eos=True)
        assert text == "" and len(tokens) == 6 and end.usage["prompt_tokens"] == 3
        for wrong, said in (
            (lambda: told(running.client, "hi"), r"tokenizer.json does not exist and is needed for a prompt of text"),
            (lambda: told(running.client, [5], stop=["x"]), "stop strings need the model's tokenizer.json"),
            (lambda: running.client.request(f"embed:{MODEL}", {"texts": ["hi"]}), "needed to embed text"),
        ):
            with pytest.raises(Refused, match=said):
                await wrong()

    served(path, body)


def test_wrong_requests_say_what_to_mend(model: Path) -> None:
    async def body(running: Cluster) -> None:
        client = running.client
        with pytest.raises(TypeError, match=r"generate\(\) has no option 'colour': there are max_tokens"):
            client.generate("hi", model=MODEL, colour=1)
        ids = np.array([5], np.int32)
        wrong: list[tuple[dict[str, Any], list[Any], type[RalmqError], str]] = [
            ({"prompt": "hi", "colour": 1}, [], Refused, "unknown option colour: there are max_tokens, temperature"),
            ({"prompt": ""}, [], Refused, "the prompt is empty: give at least one token"),
            ({}, [], Refused, "no prompt: give text, or token ids"),
            ({}, [ids[:0]], Refused, r"the prompt is int32 \[0\]: give at least one id"),
            ({}, [ids.astype(np.float32)], Refused, r"the prompt is float32 \[1\]"),
            ({}, [ids[None]], Refused, r"the prompt is int32 \[1, 1\]"),
            ({}, [np.array([-5])], Refused, "ids that no vocabulary holds"),
            ({}, [np.array([1 << 40])], Refused, "ids that no vocabulary holds"),
            ({}, [np.array([400], np.int32)], Refused, r"ids outside 0..311: use the tokenizer of this model"),
            ({"prompt": "a " * 400}, [], Refused, "the model's context holds 256: shorten it"),
            ({"prompt": "hi", "max_tokens": 0}, [], Refused, "max_tokens: "),
            ({"prompt": "hi", "temperature": -1}, [], Refused, "temperature: "),
            ({"prompt": "hi", "stop": [""]}, [], Refused, "stop.0: "),
            ({"prompt": "hi", "stop": ["x"] * 17}, [], Refused, "stop: "),
            ({"prompt": "hi", "policy": "magic"}, [], Refused, "policy: Input should be 'knn'"),
            ({"prompt": "hi", "retrieve": "nowhere"}, [], NoService, "no worker offers search:nowhere"),
        ]
        for request, tensors, kind, said in wrong:
            with pytest.raises(kind, match=said):
                await client.request(f"generate:{MODEL}", request, tensors=tensors)
        for texts in ([], [""], "hi", [5], None):
            with pytest.raises(Refused, match="texts: give a list of texts that are not empty"):
                await client.request(f"embed:{MODEL}", {"texts": texts})
        with pytest.raises(NoService, match="generate:other"):
            await client.request("generate:other", {"prompt": "hi"})

    served(model, body)


def test_texts_to_embed_leave_room_in_the_pipelines_queue(model: Path) -> None:
    class Scores(Worker):
        service, capacity, now, most = f"lm:{MODEL}", 1000, 0, 0

        async def handle(self, request: Request) -> Any:
            Scores.now += 1
            Scores.most = max(Scores.most, Scores.now)
            await asyncio.sleep(0.01)
            Scores.now -= 1
            yield {}, [np.full((1, 4), len(request.tensors[0].numpy()), np.float32)]

    async def main() -> None:
        async with in_process(Scores(), Generator(model=str(model), name=MODEL), inproc=True) as running:
            client = await running.client()
            texts = ["the quick " * (1 + place % 3) for place in range(3 * EMBEDDED)]
            vectors = (await client.request(f"embed:{MODEL}", {"texts": texts})).tensors[0].numpy()
            assert vectors.shape == (len(texts), 4) and (vectors[3:] == vectors[:-3]).all()
            assert len(np.unique(vectors)) == 3 and Scores.most == EMBEDDED
            with pytest.raises(Refused, match=f"{MAX_TEXTS + 1} of them are too many"):
                await client.request(f"embed:{MODEL}", {"texts": ["the"] * (MAX_TEXTS + 1)})

    asyncio.run(main())


def test_leaving_early_ends_the_work(model: Path) -> None:
    async def body(running: Cluster) -> None:
        for _ in range(3):
            generation = running.client.generate(PROMPT, model=MODEL, max_tokens=230, ignore_eos=True)
            seen = 0
            async for _token in generation:
                seen += 1
                if seen == 5:
                    break
            await generation.aclose()
        others = await asyncio.gather(*[told(running.client, PROMPT, max_tokens=10, ignore_eos=True) for _ in range(5)])
        assert {len(tokens) for _, tokens, _ in others} == {10}

    served(model, body)


def test_passages_embeddings_and_search_by_text(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["the quick brown fox jumps over the lazy dog. " * 5, "naïve café in Zürich; 你好世界 🎉 " * 5]
    documents = [Document(f"{number}.txt", text) for number, text in enumerate(texts)]

    async def body(running: Cluster) -> None:
        client, out = running.client, tmp_path / "docs"
        await build_datastore(client, model=MODEL, name="docs", documents=documents, tokenizer=tokenizer, out=out)
        await running.add(Index(index=out))
        opened = open_index(out)

        vectors = (await client.request(f"embed:{MODEL}", {"texts": [*texts, "fox"]})).tensors[0].numpy()
        assert vectors.shape == (3, 64) and vectors.dtype == np.float32
        for vector, text in zip(vectors, [*texts, "fox"], strict=True):
            hidden, _ = await scored(client, [*tokenizer.encode(text).ids, 5])
            assert np.allclose(vector, hidden[-1], atol=1e-4)

        hits = await client.search("docs", "the quick brown", k=3)
        ids, distances = opened.search(
            (await client.request(f"embed:{MODEL}", {"texts": ["the quick brown"]})).tensors[0].numpy(), Params(3)
        )
        assert np.allclose(hits.distances, distances, atol=1e-2) and hits.payloads[0][0]["document"] == "0.txt"
        assert tokenizer.decode(hits.payloads[0][0]["tokens"]).startswith("the quick brown")
        assert hits.payloads[0][0]["context"] == "the quick brown" and hits.payloads[0][0]["continuation"][:4] == " fox"
        assert hits.distances[0, 0] < 1e-3 and hits.ids.shape == ids.shape == (1, 3)

        plain = await told(client, "the quick", max_tokens=8)
        assert not any(token.passages for token in plain[1])
        led = await told(client, "the quick", retrieve="docs", k=1, knn_lambda=0.99, max_tokens=20)
        assert led[0] != plain[0] and texts[0].startswith("the quick" + led[0]), "nearest is what was scored there"

        _, tokens, _ = await told(client, "the quick", retrieve="docs", k=4, interval=2, passages=True, max_tokens=8)
        assert [len(token.passages) for token in tokens] == [4, 0] * (len(tokens) // 2)
        passages = [passage for token in tokens for passage in token.passages]
        known = {"document", "start", "split", "tokens", "context", "continuation", "id", "distance"}
        assert all(set(passage) == known for passage in passages)
        whole = [p for p in passages if "\N{REPLACEMENT CHARACTER}" not in p["context"] + p["continuation"]]
        assert whole and all(p["context"] + p["continuation"] in texts[int(p["document"][0])] for p in whole)
        first = tokens[0].passages[0]
        assert first["document"] == "0.txt" and first["context"].endswith("the quick")
        assert first["continuation"].startswith(" brown") and first["distance"] < 1e-3

    served(model, body)


def test_the_tokenizer_of_a_checkpoint(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A broken one is refused at the start; what it says of truncation and padding is not for prompts."""
    path = shutil.copytree(model, tmp_path / "m")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match=r"tokenizer.json cannot be read .*: copy it anew from the model"):
        asyncio.run(Generator(model=str(path)).start())
    with pytest.raises(Refused, match="no such model directory"):
        Generator(model=str(tmp_path / "none"))
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=16)
    cutting.save(str(path / "tokenizer.json"))
    worker = build(find("generator"), [f"model={path}"])
    assert worker.services == ("generate:m", "embed:m")

    async def body(running: Cluster) -> None:
        for prompt in ("the quick brown fox jumps over the lazy dog", "a"):
            _, _, end = await told(running.client, prompt, max_tokens=2)
            assert end.usage["prompt_tokens"] == len(tokenizer.encode(prompt).ids)

    served(path, body)
