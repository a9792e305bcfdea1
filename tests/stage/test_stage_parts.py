"""Stages that were each given only their part of a model, in the forms that their options name."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ralmq.schema.errors import Refused
from ralmq.workers.engine.split import split
from ralmq.workers.stage.weights import load, place_of
from ralmq.workers.stage.worker import Stage
from stage.pipelines import MODEL, Answered, cluster, generated, prompts, stages


async def answered(members: list[Stage]) -> list[Answered]:
    async with cluster(*members) as running:
        found = [await generated(running.client, prompt, max_tokens=12) for prompt in prompts(3)]
        await running.settled()
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_pipeline_of_parts_and_of_the_whole(checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    whole = checkpoint(family)
    parts = split(whole, 3, tmp_path / "parts")
    members = [Stage(model=str(part), stage=f"{place}/3", name=MODEL) for place, part in enumerate(parts)]
    members[1] = Stage(model=str(whole), stage="1/3", name=MODEL)
    got, expected = (asyncio.run(answered(them)) for them in (members, stages(whole, 1)))
    assert [one.tokens for one in got] == [one.tokens for one in expected]


def test_int8_generates_and_says_what_it_is(checkpoint: Callable[[str], Path]) -> None:
    got = asyncio.run(answered(stages(checkpoint("llama"), 2, dtype="int8")))
    assert all(len(one.tokens) == 12 for one in got)


def test_options_that_no_weights_are_loaded_with(checkpoint: Callable[[str], Path]) -> None:
    place = place_of(str(checkpoint("llama")), "0/2", "", "")
    options: dict[str, Any] = {"device": "cpu", "kv_mib": 4, "max_rows": 2}
    with pytest.raises(Refused, match="dtype int4 is unknown: give one of fp32, bf16, fp16, int8"):
        load(place, dtype="int4", **options)
    for packed in (False, True):
        assert load(place, dtype="int8", **options, packed=packed).span.bytes > 0
