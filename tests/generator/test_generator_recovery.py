"""Stages, generators and indexes that are lost amid a generation: the reader sees a pause, and the text is the same."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.errors import Poisoned, WorkerLost
from ralmq.schema.limits import LOSSES
from ralmq.workers.base import Worker
from ralmq.workers.datastore.build import build_datastore
from ralmq.workers.datastore.sources import Document
from ralmq.workers.generator.worker import Generator
from ralmq.workers.search.worker import Index
from ralmq.workers.stage.worker import Stage
from serving import until
from stage.pipelines import MODEL, Cluster, cluster, stages
from tokenizers import Tokenizer

PROMPT, TOKENS = "the quick brown", 40
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 7, "repetition_penalty": 1.2, "logprobs": True}
EXACT = {"deterministic": 8}  # so that what is computed again has the same bits
TASKS: list[dict[str, Any]] = [{"seed": 3}, SAMPLED, {**SAMPLED, "n": 3}, {"echo": True, "logprobs": True, **SAMPLED}]


def generator(path: Path) -> Generator:
    return Generator(model=str(path), name=MODEL)


async def told(
    running: Cluster, at: int = -1, then: Callable[[], Any] | None = None, **task: Any
) -> tuple[list[Any], Any]:
    """All tokens and the end; `then` happens once `at` tokens have come."""
    options = {"max_tokens": TOKENS, "ignore_eos": True, **task}
    generation = running.client.generate(PROMPT, model=MODEL, deadline=60, **options)
    tokens = []
    async for token in generation:
        tokens.append(token)
        if len(tokens) == at and then is not None:
            await then()
    return tokens, generation


def same(found: tuple[list[Any], Any], wanted: tuple[list[Any], Any]) -> None:
    """Token for token, each text in its own order; and the same end."""
    texts = {token.index for token in wanted[0]}
    for index in texts:
        assert [t for t in found[0] if t.index == index] == [t for t in wanted[0] if t.index == index]
    assert {token.index for token in found[0]} == texts
    assert found[1].finish_reasons == wanted[1].finish_reasons and found[1].usage == wanted[1].usage


@pytest.mark.parametrize("task", TASKS, ids=["greedy", "sampled", "n", "echo"])
def test_a_lost_stage_at_any_token(model: Path, task: dict[str, Any]) -> None:
    """Each of two stages, at several tokens; a spare takes its place."""

    async def main() -> None:
        async with cluster(*stages(model, 2, **EXACT), generator(model)) as running:
            wanted = await told(running, **task)
        lost = 0
        for place in range(2):
            for at in (1, 13, 39):
                members = stages(model, 2, **EXACT)
                async with cluster(*members, *stages(model, 2, **EXACT), generator(model)) as running:
                    found = await told(running, at, lambda members=members: running.kill(members[place]), **task)  # noqa: B023
                    await running.settled()
                    lost += (await running.client.status())["broker"]["counts"].get("worker_lost", 0)
                same(found, wanted)
        assert lost >= 2, "near its end a text may be sent already"

    asyncio.run(main())


@pytest.mark.parametrize("task", TASKS, ids=["greedy", "sampled", "n", "echo"])
def test_a_lost_generator_at_any_token(model: Path, task: dict[str, Any]) -> None:
    """Another one goes on from the tokens that the client has."""

    async def main() -> None:
        async with cluster(*stages(model, 2, **EXACT), generator(model)) as running:
            wanted = await told(running, **task)
            for at in (1, 7, 25):
                first = running.hosts[2].worker

                async def replaced(first: Worker = first) -> None:
                    await running.kill(first)
                    await running.add(generator(model))

                same(await told(running, at, replaced, **task), wanted)
            await running.settled()

    asyncio.run(main())


def test_all_of_it_lost_and_started_anew(model: Path) -> None:
    """No stage and no generator is left for a while; many texts at once."""

    async def main() -> None:
        async with cluster(*stages(model, 2, **EXACT), generator(model)) as running:
            tasks = [{**SAMPLED, "seed": seed} for seed in range(6)]
            wanted = [await told(running, **task) for task in tasks]
            under_way = [asyncio.create_task(told(running, **task)) for task in tasks]
            for _ in range(3):
                await asyncio.sleep(0.15)
                for host in running.hosts[:]:
                    await running.kill(host.worker)
                await asyncio.sleep(0.1)
                await running.add(generator(model), *stages(model, 2, **EXACT))
            for found, one in zip(await asyncio.gather(*under_way), wanted, strict=True):
                same(found, one)
            await running.settled()

    asyncio.run(main())


def test_stop_strings_and_ends_of_text_hold_over_a_loss(model: Path) -> None:
    """The text that was held back for a stop string, and a last token whose end was lost with its generator."""

    async def main() -> None:
        async with cluster(*stages(model, 2, **EXACT), generator(model)) as running:
            whole = "".join(token.text for token in (await told(running, **SAMPLED))[0])
            task = {**SAMPLED, "stop": [whole[20:26]]}
            wanted = await told(running, **task)
            assert wanted[1].finish_reason == "stop" and len(wanted[0]) > 3

            async def replaced() -> None:
                await running.kill(running.hosts[2].worker)
                await running.add(generator(model))

            for at in range(1, len(wanted[0]) - 1, 2):
                same(await told(running, at, replaced, **task), wanted)

    asyncio.run(main())


def test_what_kills_its_stages_each_time_ends_and_harms_no_other(model: Path, tokenizer: Tokenizer) -> None:
    """The first stage is lost whenever it sees one certain token; the others go on."""
    poison = tokenizer.encode("Z").ids[-1]

    class Frail(Stage):
        async def start(self) -> None:
            await super().start()
            span, loop = self._runner._span, asyncio.get_running_loop()
            forward = span.forward

            def checked(rows: Any, x: Any, **options: Any) -> Any:
                if poison in x.tolist():
                    asyncio.run_coroutine_threadsafe(self.host.close(), loop).result(30)
                    raise RuntimeError("gone")
                return forward(rows, x, **options)

            span.forward = checked  # type: ignore[assignment, method-assign]

    def frail() -> Stage:
        return Frail(model=str(model), stage="0/2", name=MODEL, **EXACT)

    async def main() -> None:
        bias = {"logit_bias": {poison: -100.0}}
        async with cluster(frail(), stages(model, 2, **EXACT)[1], generator(model)) as running:
            await running.add(*[frail() for _ in range(LOSSES)])
            wanted = [await told(running, seed=seed, temperature=1.0, **bias) for seed in range(5)]
            innocent = [asyncio.create_task(told(running, seed=seed, temperature=1.0, **bias)) for seed in range(5)]
            with pytest.raises((Poisoned, WorkerLost)) as ended:
                async for _ in running.client.generate([3, poison], model=MODEL, deadline=60):
                    pass
            assert isinstance(ended.value, Poisoned) and "3 times in a row" in ended.value.message
            for one, found in zip(wanted, await asyncio.gather(*innocent), strict=True):
                same(found, one)
            status = await running.client.status()
            assert len([w for w in status["workers"] if w["services"] == [f"lm:{MODEL}"]]) == 2

    asyncio.run(main())


def test_an_index_that_is_lost_is_waited_for(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = " ".join(str(number) for number in np.random.default_rng(0).integers(0, 99, 400))
    options = {"retrieve": "docs", "k": 4, "interval": 2, "knn_lambda": 0.5, "knn_temperature": 100.0, **SAMPLED}

    async def main() -> None:
        async with cluster(*stages(model, 2, **EXACT), generator(model)) as running:
            documents = [Document("a.txt", words)]
            await build_datastore(
                running.client,
                model=MODEL,
                name="docs",
                documents=documents,
                tokenizer=tokenizer,
                out=tmp_path / "docs",
            )
            await running.add(Index(index=tmp_path / "docs"))
            wanted = await told(running, **options)

            async def away() -> None:
                await running.kill(running.hosts[-1].worker)
                await asyncio.sleep(0.3)
                await running.add(Index(index=tmp_path / "docs"))

            for at in (1, 8, 21):
                same(await told(running, at, away, **options), wanted)
            await until(lambda: len(running.hosts) == 4)
            await running.settled()

    asyncio.run(main())


def test_an_index_that_is_away_when_a_text_begins(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Who waits for a model waits for the index, too; a text that is under way waits for all that it needs."""
    path, options = tmp_path / "docs", {"retrieve": "docs", "k": 4, "knn_temperature": 100.0, **SAMPLED}

    async def main() -> None:
        async with cluster(*stages(model, 2, **EXACT), generator(model)) as running:

            async def index() -> dict[str, Any]:
                """What the broker knows of the service; nothing once the grace after its loss is over."""
                services: dict[str, dict[str, Any]] = (await running.client.status())["services"]
                return services.get("search:docs", {})

            async def asked_for() -> bool:
                return (await index()).get("queued", 0) > 0

            async def forgotten() -> bool:
                return not await index()

            words = " ".join(str(number) for number in np.random.default_rng(0).integers(0, 99, 400))
            parts = {"documents": [Document("a.txt", words)], "tokenizer": tokenizer, "out": path}
            await build_datastore(running.client, model=MODEL, name="docs", **parts)
            begun = asyncio.create_task(told(running, wait_service=60, **options))
            await until(asked_for, "a question for the index")
            await running.add(Index(index=path))
            wanted = await begun

            async def away() -> None:
                for host in running.hosts[:2] + running.hosts[3:]:
                    await running.kill(host.worker)
                await until(forgotten, "the end of its grace")
                await running.add(*stages(model, 2, **EXACT))
                await until(asked_for, "a question for the index")
                await running.add(Index(index=path))

            same(await told(running, 8, away, **options), wanted)
            await running.settled()

    asyncio.run(main())
