"""Chunks, cached prefixes and preemption over real pipelines: the tokens are what they are without them."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES
from ralmq.schema.message import Span
from ralmq.workers.stage.leader import Leader
from ralmq.workers.stage.worker import Stage
from stage.pipelines import MODEL, Answered, Cluster, cluster, generated, prompts, stages
from transformers import PreTrainedModel

PROMPTS = [*prompts(7), prompts(1, seed=9)[0] * 4]
TOKENS, MARGIN = 24, 1e-4
BLOCKS = 14  # for 4 to 7 of the 8 sequences, at most


class Small(Stage):
    """A stage that offers few KV blocks."""

    @property
    def span(self) -> Span | None:
        offer = super().span
        return offer if offer is None else offer._replace(kv_blocks=BLOCKS)


def small(path: Path, count: int, **options: Any) -> list[Stage]:
    return [Small(model=str(path), stage=f"{place}/{count}", name=MODEL, **options) for place in range(count)]


async def formed(running: Cluster) -> Leader:
    """The leader, once the pipeline has answered."""
    await generated(running.client, [3], max_tokens=1)
    first = running.hosts[0].worker
    assert isinstance(first, Stage) and first._leader is not None
    return first._leader


async def asked(running: Cluster, **task: Any) -> list[Answered]:
    """All of PROMPTS at once."""
    return list(await asyncio.gather(*[generated(running.client, p, max_tokens=TOKENS, **task) for p in PROMPTS]))


def wrong(model: PreTrainedModel, answers: Sequence[Answered]) -> int:
    """Tokens that are not transformers' best, given those before, near ties left out."""
    count = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > MARGIN
        count += int((best.indices[sure, 0] != torch.tensor(answer.tokens)[sure]).sum())
        assert int((~sure).sum()) <= 1, "nearly equal logits everywhere would prove nothing"
    return count


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_chunks_from_cached_prefixes_and_after_preemption(
    family: str, checkpoint: Callable[[str], Path], oracle: Callable[[str], PreTrainedModel]
) -> None:
    async def main() -> None:
        async with cluster(*stages(checkpoint(family), 2, chunk=7)) as running:
            leader = await formed(running)
            for hot in (False, True):
                before = leader.memory.reused
                assert wrong(oracle(family), await asked(running)) == 0
                assert (leader.memory.reused > before) is hot
            await running.settled()
        async with cluster(*small(checkpoint(family), 2)) as running:
            leader = await formed(running)
            assert wrong(oracle(family), await asked(running)) == 0
            assert leader.preempted > 0 and leader.memory.peak <= BLOCKS
            await running.settled()

    asyncio.run(main())


def test_deterministic_gives_the_same_bits_however_it_is_scheduled(checkpoint: Callable[[str], Path]) -> None:
    """Seeded sampling with log p: one after the other, all at once, in chunks, after a preemption; 1 and 3 stages."""
    task: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "logprobs": True}
    path, options = checkpoint("llama"), {"deterministic": 8}

    async def main() -> list[list[Answered]]:
        runs: list[list[Answered]] = []
        async with cluster(*stages(path, 1, **options)) as running:
            runs.append([await generated(running.client, p, max_tokens=TOKENS, **task) for p in PROMPTS])
            runs.append(await asked(running, **task))
        async with cluster(*stages(path, 3, chunk=5, **options)) as running:
            runs.append(await asked(running, **task))
        async with cluster(*small(path, 2, **options)) as running:
            leader = await formed(running)
            runs.append(await asked(running, **task))
            assert leader.preempted > 0
        return runs

    first, *others = asyncio.run(main())
    for other in others:
        assert [answer.tokens for answer in other] == [answer.tokens for answer in first]
        assert [answer.logprobs for answer in other] == [answer.logprobs for answer in first]
