"""A STEP that cannot be read, and a hidden state that no index takes: told at once, and nothing is lost for good."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from ralmq.errors import WorkerLost
from ralmq.schema.frame import read_prefix
from ralmq.schema.limits import HEAD
from ralmq.schema.message import Error, Kind, Return, Row
from ralmq.workers.stage.last import Last
from ralmq.workers.stage.worker import Stage
from stage.pipelines import Cluster, cluster, generated, prompts, stages

PROMPT = prompts(1, seed=3)[0]


@pytest.mark.parametrize("place", [0, 1])
def test_a_step_that_cannot_be_read_ends_the_pipeline_with_an_answer(
    place: int, checkpoint: Callable[[str], Path]
) -> None:
    async def body(running: Cluster, members: list[Stage]) -> None:
        link: Any = members[place].host.link
        whole, cut = link._received, []

        def received(frames: list[Any]) -> None:
            if not cut and read_prefix(frames[0]).kind == Kind.STEP:
                cut.append(frames)
                head = bytes(frames[0])
                frames = [head[:HEAD] + b"\xc1" + head[HEAD + 1 :], *frames[1:]]
            whole(frames)

        link._wire._take = received
        with pytest.raises(WorkerLost):
            await generated(running.client, PROMPT, max_tokens=8)
        assert len(cut) == 1
        answered = await generated(running.client, PROMPT, max_tokens=8)
        assert len(answered.tokens) == 8
        await running.settled()

    async def main() -> None:
        members = stages(checkpoint("llama"), 2)
        async with cluster(*members) as running:
            await body(running, members)

    asyncio.run(main())


class FlatSpan:
    """A last span whose head gives the same logits everywhere."""

    class config:
        hidden, context, vocab = 4, 64, 16
        eos_ids = ()

    def head(self, hidden: torch.Tensor, want: Any = None) -> torch.Tensor:
        return torch.zeros(len(hidden) if want is None else len(want), 16)


def test_a_hidden_state_that_is_not_finite_fails_its_row_alone() -> None:
    last = Last(FlatSpan(), "f")  # type: ignore[arg-type]
    task = {"retrieve": {"index": "docs"}, "max_tokens": 4}
    keys = [(bytes([n]) * 16, 0) for n in range(3)]
    for key in keys:
        last.start(key, np.zeros(2, np.int32), {"task": msgpack.packb(task), "seconds": 5.0})
    entered = torch.ones(3, 4)
    entered[1, 2] = float("nan")
    rows = tuple(Row(*key, 1, 1, (0,)) for key in keys)
    outcome = last.step(rows, torch.ones(3, 4), entered)
    assert [(type(message), key) for message, key, _ in outcome.sent] == [(Error, keys[1])]
    assert outcome.returns == [Return(*keys[1], -1, True)]
    (query,) = outcome.queries
    assert query.keys == [keys[0], keys[2]] and np.isfinite(query.vectors).all() and 0 < query.seconds() <= 5.0
