"""Several texts at once, echo, alternatives, penalties and hooks as a client asks for them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.cli.prompts import Prompt, answer
from ralmq.client.client import Client
from ralmq.client.results import Token
from ralmq.errors import Busy, Refused
from ralmq.workers.base import Request, Worker
from ralmq.workers.generator.merge import merged
from ralmq.workers.generator.options import seed_of
from ralmq.workers.generator.worker import Generator
from serving import until
from stage.pipelines import MODEL, Cluster, cluster, scored, stages
from tokenizers import Tokenizer

PROMPT = "the quick brown"
SAMPLED = {"temperature": 1.0, "seed": 7, "ignore_eos": True}


def served(path: Path, body: Callable[[Cluster], Any]) -> None:
    async def main() -> None:
        async with cluster(*stages(path, 2), Generator(model=str(path), name=MODEL)) as running:
            await body(running)
            await running.settled()

    asyncio.run(main())


async def told(client: Client, prompt: str | list[int], **options: Any) -> tuple[list[Token], Any]:
    generation = client.generate(prompt, model=MODEL, deadline=60, **options)
    return [token async for token in generation], generation


def text_of(tokens: list[Token], index: int = 0) -> str:
    return "".join(token.text for token in tokens if token.index == index)


def test_each_of_n_texts_is_that_of_its_own_seed(model: Path) -> None:
    async def body(running: Cluster) -> None:
        options = {**SAMPLED, "max_tokens": 30}
        tokens, end = await told(running.client, PROMPT, n=5, **options)
        assert end.usage["seed"] == 7 and end.usage["completion_tokens"] == 150
        assert end.usage["seeds"] == [seed_of(7, index) for index in range(5)] and end.usage["seeds"][0] == 7
        assert end.finish_reasons == dict.fromkeys(range(5), "length") and end.finish_reason == "length"
        for index, seed in enumerate(end.usage["seeds"]):
            alone, _ = await told(running.client, PROMPT, **{**options, "seed": seed})
            assert text_of(tokens, index) == text_of(alone)
            assert [t.id for t in tokens if t.index == index and t.id >= 0] == [t.id for t in alone if t.id >= 0]
        assert len({text_of(tokens, index) for index in range(5)}) == 5

    served(model, body)


def test_texts_end_by_themselves(model: Path) -> None:
    """A stop string of one of them leaves the others alone; what is held back comes with the end of its own text."""

    async def body(running: Cluster) -> None:
        options = {**SAMPLED, "max_tokens": 60, "n": 3}
        plain, _ = await told(running.client, PROMPT, **options)
        stop = next(
            text_of(plain, 1)[place : place + 5]
            for place in range(4, 60)
            if not any(text_of(plain, 1)[place : place + 5] in text_of(plain, index) for index in (0, 2))
        )
        tokens, end = await told(running.client, PROMPT, stop=[stop, text_of(plain, 2)[-4:] + "never"], **options)
        assert end.finish_reasons == {0: "length", 1: "stop", 2: "length"}
        assert text_of(tokens, 1) == text_of(plain, 1)[: text_of(plain, 1).find(stop)]
        assert [text_of(tokens, index) for index in (0, 2)] == [text_of(plain, index) for index in (0, 2)]

    served(model, body)


def test_leaving_several_texts_early_ends_all(model: Path) -> None:
    async def idle(running: Cluster) -> bool:
        return not any(entry["in_flight"] for entry in await running.gauges())

    async def body(running: Cluster) -> None:
        generation = running.client.generate(PROMPT, model=MODEL, n=4, **{**SAMPLED, "max_tokens": 230})
        seen: set[int] = set()
        async for token in generation:
            seen.add(token.index)
            if len(seen) == 4:
                break
        await generation.aclose()
        await until(lambda: idle(running), "the end of all texts")

    served(model, body)


def test_echo_gives_the_prompt_first(model: Path, tokenizer: Tokenizer) -> None:
    text = "naïve café, Zürich; 你好世界 🎉 the quick"
    ids = tokenizer.encode(text).ids

    async def body(running: Cluster) -> None:
        plain, _ = await told(running.client, text, max_tokens=10, **SAMPLED)
        tokens, end = await told(running.client, text, max_tokens=10, echo=True, **SAMPLED)
        assert text_of(tokens[: len(ids)]) == text and tokens[len(ids) :] == plain
        assert [token.id for token in tokens[: len(ids)]] == ids and {t.logprob for t in tokens} == {None}
        assert [token.position for token in tokens if token.id >= 0] == list(range(len(ids) + 10))
        assert end.usage == {"prompt_tokens": len(ids), "completion_tokens": 10, "seed": 7}

        _, log_p = await scored(running.client, ids)
        tokens, end = await told(running.client, text, max_tokens=0, echo=True, top_logprobs=3)
        assert [token.id for token in tokens] == ids and end.finish_reason == "length"
        assert tokens[0].logprob is None and tokens[0].top_logprobs == ()
        assert np.array_equal([token.logprob for token in tokens[1:]], log_p.astype(np.float64))
        for token in tokens[1:]:
            best = token.top_logprobs
            assert len(best) == 3 and best[0].logprob >= best[1].logprob >= best[2].logprob
            assert best[0].text == tokenizer.decode([best[0].id], skip_special_tokens=False)
            assert token.logprob is not None and token.logprob <= best[0].logprob

        several, end = await told(running.client, text, max_tokens=5, echo=True, n=2, **SAMPLED)
        assert all(text_of(several, index).startswith(text) for index in (0, 1))
        assert text_of(several, 0) != text_of(several, 1)
        single, _ = await told(running.client, ids[:1], max_tokens=1, echo=True, logprobs=True)
        assert [token.logprob is None for token in single if token.id >= 0] == [True, False]

    served(model, body)


def test_alternatives_have_their_text(model: Path, tokenizer: Tokenizer) -> None:
    async def body(running: Cluster) -> None:
        tokens, _ = await told(running.client, PROMPT, max_tokens=12, top_logprobs=20)
        for token in tokens[:12]:
            assert len(token.top_logprobs) == 20 and token.top_logprobs[0].id == token.id, "greedy takes the best"
            assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5)
            assert [entry.text for entry in token.top_logprobs] == [
                tokenizer.decode([entry.id], skip_special_tokens=False) for entry in token.top_logprobs
            ]
        assert not (await told(running.client, PROMPT, max_tokens=2, logprobs=True))[0][0].top_logprobs

    served(model, body)


def test_bias_stop_ids_and_min_tokens(model: Path) -> None:
    async def body(running: Cluster) -> None:
        client = running.client
        tokens, _ = await told(client, PROMPT, max_tokens=5, logit_bias={44: 100.0})
        assert [token.id for token in tokens if token.id >= 0] == [44] * 5
        plain, _ = await told(client, PROMPT, max_tokens=40, **SAMPLED)
        stop = plain[6].id
        first = [token.id for token in plain].index(stop)
        tokens, end = await told(client, PROMPT, max_tokens=40, stop_ids=[stop], **SAMPLED)
        assert end.finish_reason == "stop" and end.usage["completion_tokens"] == first + 1
        assert [token.id for token in tokens if token.id >= 0] == [token.id for token in plain[: first + 1]]
        tokens, end = await told(client, PROMPT, max_tokens=40, stop_ids=[stop], min_tokens=15, **SAMPLED)
        ids = [token.id for token in tokens if token.id >= 0]
        assert len(ids) > 15 and stop not in ids[:15]
        letters = [chr(code) for code in range(ord("a"), ord("a") + 8)]
        _, end = await told(client, PROMPT, max_tokens=40, stop=letters, **SAMPLED)
        early = end.usage["completion_tokens"]
        tokens, end = await told(client, PROMPT, max_tokens=40, stop=letters, min_tokens=early + 3, **SAMPLED)
        assert end.usage["completion_tokens"] > early + 3, "a stop string does not end it earlier either"
        assert text_of(tokens).startswith(text_of(plain[: early + 2]))

    served(model, body)


def test_wrong_options_say_what_to_mend(model: Path) -> None:
    async def body(running: Cluster) -> None:
        for options, said in (
            ({"n": 2}, "n=2 with temperature 0 gives the same text each time: give a temperature"),
            ({"n": 65, "temperature": 1.0}, "n: "),
            ({"max_tokens": 0}, "^max_tokens: 0 leaves nothing to do"),
            ({"max_tokens": 4, "min_tokens": 5}, "^min_tokens=5 is more than max_tokens=4: lower it"),
            ({"top_logprobs": 21}, "top_logprobs: "),
            ({"min_p": 1.5}, "min_p: "),
            ({"repetition_penalty": 0}, "repetition_penalty: "),
            ({"presence_penalty": 3}, "presence_penalty: "),
            ({"frequency_penalty": -3}, "frequency_penalty: "),
            ({"logit_bias": {4: 101}}, "logit_bias.0.1: "),
            ({"logit_bias": {312: 1}}, "logit_bias has ids outside 0..311"),
            ({"stop_ids": [-1]}, "stop_ids has ids outside 0..311"),
            ({"hooks": {"nobody": {}}}, "hook nobody is unknown, none is loaded"),
        ):
            with pytest.raises(Refused, match=said):
                await told(running.client, PROMPT, **options)

    served(model, body)


def test_prompts_of_a_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [
        Prompt(PROMPT, {"max_tokens": 6}),
        Prompt([5, 6, 7], {"max_tokens": 4, "top_logprobs": 2}),
        Prompt([5, 4000], {"max_tokens": 4}),
        Prompt(PROMPT, {"max_tokens": 3, "n": 2, "temperature": 1.0, "seed": 1}),
        *[Prompt(f"{PROMPT} {number}", {"max_tokens": 5}) for number in range(20)],
    ]

    async def body(running: Cluster) -> None:
        assert await answer(running.url, MODEL, prompts, 4, 60.0) == 1
        said = capsys.readouterr()
        lines = sorted(map(json.loads, said.out.splitlines()), key=lambda line: line["index"])
        assert [line["index"] for line in lines] == list(range(24))
        assert "ids outside 0..311" in lines[2]["error"] and set(lines[2]) == {"index", "error"}
        for line, (tokens, end) in zip(
            [lines[0], lines[4]],
            [await told(running.client, f"{PROMPT}{more}", max_tokens=most) for more, most in (("", 6), (" 0", 5))],
            strict=True,
        ):
            assert line["text"] == text_of(tokens) and line["tokens"] == [t.id for t in tokens if t.id >= 0]
            assert line["finish_reason"] == end.finish_reason
            assert line["usage"]["prompt_tokens"] == end.usage["prompt_tokens"]
        assert [len(entries) for entries in lines[1]["top_logprobs"]] == [2] * len(lines[1]["tokens"])
        assert set(lines[1]["top_logprobs"][0][0]) == {"id", "logprob", "text"}
        assert [choice["index"] for choice in lines[3]["choices"]] == [0, 1]
        assert lines[3]["choices"][0]["text"] == lines[3]["text"]
        assert said.err.splitlines()[-1] == "24 of 24 done, 1 failed"

    served(model, body)


class Crowded(Worker):
    """A generator that is full each time but the third."""

    service = f"generate:{MODEL}"
    asked = 0

    async def handle(self, request: Request) -> AsyncGenerator[dict[str, Any], None]:
        self.asked += 1
        if self.asked % 3:
            raise Busy("full", retry_after=0.01)
        yield {"text": "x", "token": 5, "position": 1}


def test_a_full_generator_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        crowded = Crowded()
        async with cluster(crowded) as running:
            assert await answer(running.url, MODEL, [Prompt("a", {})] * 5, 1, 60.0) == 0
            assert crowded.asked == 15

    asyncio.run(main())
    assert [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()] == [[5]] * 5


def test_merging_ends_all_by_the_first_error() -> None:
    closed: list[int] = []

    async def source(place: int, count: int, error: bool) -> AsyncGenerator[int, None]:
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield number
            if error:
                raise KeyError(place)
        finally:
            closed.append(place)

    async def taken(*sources: AsyncGenerator[int, None], most: int = 1 << 30) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        several = merged(sources)
        async for item in several:
            found.append(item)
            if len(found) == most:
                break
        await several.aclose()
        return found

    whole = asyncio.run(taken(source(0, 3, False), source(1, 0, False), source(2, 50, False)))
    assert [n for place, n in whole if place == 0] == [0, 1, 2]
    assert [n for place, n in whole if place == 2] == list(range(50)) and sorted(closed) == [0, 1, 2]
    closed.clear()
    with pytest.raises(KeyError):
        asyncio.run(taken(source(0, 9, True), source(1, 1 << 30, False)))
    assert sorted(closed) == [0, 1]
    closed.clear()
    assert len(asyncio.run(taken(source(0, 1 << 30, False), source(1, 1 << 30, False), most=40))) == 40
    assert sorted(closed) == [0, 1]
