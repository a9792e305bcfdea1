"""A reader's credit reaches the pipeline: it is never further ahead than the window, and goes on when that moves."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.workers.generator.worker import Generator
from serving import until
from stage.pipelines import MODEL, cluster, stages

WINDOW, TOKENS = 8, 60


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("made", [0, 3])
def test_the_pipeline_is_no_further_ahead_than_the_reader_s_window(model: Path, echo: bool, made: int) -> None:
    asyncio.run(_ahead(model, echo, made))


async def _ahead(model: Path, echo: bool, made: int) -> None:
    """The leader counts the tokens that it knows: those of the prompt, and those made."""
    prompt = [5, 6, 7]
    options: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "echo": echo}
    if made:
        options |= {"made": [list(range(9, 9 + made))], "ended": [""]}
    members = stages(model, 2)
    async with cluster(*members, Generator(model=str(model), name=MODEL)) as running:
        tensors = [np.array(prompt, np.int32)]
        stream = running.client.stream(f"generate:{MODEL}", options, tensors=tensors, window=WINDOW)
        leader = members[0]._leader
        assert leader is not None
        before = len(prompt) * echo

        def known() -> int:
            """Parts of the answer that are made, those of the prompt included."""
            return before + sum(len(sequence.tokens) for sequence in leader._sequences.values()) - len(prompt) - made

        for read in (0, 5, 6, 20):
            while stream._pending._taken < read:
                await anext(stream)
            granted = stream._pending.granted
            assert granted <= read + WINDOW
            await until(lambda granted=granted: known() == granted, "the pipeline's progress")
            await asyncio.sleep(0.1)
            assert known() == granted and not leader.working, "it waits for its reader"
        rest = [part async for part in stream]
        assert 20 + len(rest) == before + TOKENS - made
        await running.settled()
