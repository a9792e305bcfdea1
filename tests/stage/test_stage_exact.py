"""Pipelines of 1 to 4 stages over the real broker against transformers in one process, in fp32."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from stage.pipelines import Answered, cluster, generated, prompts, scored, stages
from transformers import PreTrainedModel

FAMILIES = ("gpt2", "llama", "qwen3")
COUNTS = (1, 2, 3, 4)
TOKENS = 24
MARGIN = 1e-4  # between the two best logits: below it rounding may choose

Model = Callable[[str], PreTrainedModel]


@dataclass
class Run:
    """What one pipeline answered."""

    batched: list[Answered]
    alone: list[Answered]
    sampled: list[Answered]
    hidden: np.ndarray
    logp: np.ndarray
    largest: int  # rows in one micro-batch


PROMPTS = prompts(8)
TEXT = prompts(1, seed=5)[0] * 12  # to score: some hundreds of ids
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234, "max_tokens": TOKENS}


async def measured(path: Path, count: int) -> Run:
    members = stages(path, count)
    async with cluster(*members) as running:
        client = running.client
        alone = [await generated(client, prompt, max_tokens=TOKENS) for prompt in PROMPTS[:3]]
        sampled = [await generated(client, prompt, **SAMPLING) for prompt in PROMPTS[:3]]
        hidden, logp = await scored(client, TEXT[:250])
        sizes: list[int] = []
        runner = members[-1]._runner
        forward = runner._span.forward
        runner._span.forward = lambda rows, *given, **options: (  # type: ignore[method-assign]
            sizes.append(len(rows)) or forward(rows, *given, **options)
        )
        batched = await asyncio.gather(*[generated(client, prompt, max_tokens=TOKENS) for prompt in PROMPTS])
        await running.settled()
    return Run(list(batched), alone, sampled, hidden, logp, max(sizes))


@pytest.fixture(scope="module")
def run(checkpoint: Callable[[str], Path]) -> Callable[[str, int], Run]:
    return cache(lambda family, count: asyncio.run(measured(checkpoint(family), count)))


def logits_of(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """transformers' logits [tokens, vocab] at the place of each token, given those before it."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_tokens_of_transformers(
    family: str, count: int, run: Callable[[str, int], Run], oracle: Model
) -> None:
    """Given the tokens before it, each token is the one that transformers finds most probable, alone and with 7 others.

    Where the two best are closer than MARGIN either is right; these are counted apart and are few.
    """
    found = run(family, count)
    close = total = 0
    answers = [*zip(PROMPTS, found.batched, strict=True), *zip(PROMPTS, found.alone, strict=False)]
    for prompt, answer in answers:
        assert len(answer.tokens) == TOKENS and answer.final == {"finish_reason": "length", "completion_tokens": TOKENS}
        assert answer.positions == list(range(len(prompt), len(prompt) + TOKENS))
        best = logits_of(oracle(family), prompt, answer.tokens).topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > MARGIN
        assert torch.equal(best.indices[sure, 0], torch.tensor(answer.tokens)[sure])
        close += int((~sure).sum())
        total += TOKENS
    assert total == 11 * TOKENS and close < 0.01 * total
    assert found.largest > 1, "nothing was batched"


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_of_transformers(family: str, run: Callable[[str, int], Run], oracle: Model) -> None:
    """The same in one call, over two stages; each of these differs from it at most behind a near tie."""
    same = 0
    for prompt, answer in zip(PROMPTS, run(family, 2).batched, strict=True):
        ids = torch.tensor([prompt])
        whole = oracle(family).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted = whole[0, len(prompt) :].tolist()
        same += wanted == answer.tokens
        if wanted != answer.tokens:
            place = next(n for n, pair in enumerate(zip(wanted, answer.tokens, strict=True)) if pair[0] != pair[1])
            best = logits_of(oracle(family), prompt, answer.tokens)[place].topk(2).values
            assert best[0] - best[1] <= MARGIN
    assert same >= 7


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_splitting_changes_no_bit(family: str, count: int, run: Callable[[str, int], Run]) -> None:
    """One sequence alone: hidden states and log p, greedy tokens, and sampled ones with the same seed."""
    whole, split = run(family, 1), run(family, count)
    assert whole.hidden.shape == (249, 64) and whole.logp.shape == (249,)
    assert np.array_equal(whole.hidden, split.hidden) and np.array_equal(whole.logp, split.logp)
    assert [answer.tokens for answer in whole.alone] == [answer.tokens for answer in split.alone]
    assert [answer.tokens for answer in whole.sampled] == [answer.tokens for answer in split.sampled]
    assert [answer.tokens for answer in whole.sampled] != [answer.tokens for answer in whole.alone]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_gives_the_probabilities_of_transformers(
    family: str, run: Callable[[str, int], Run], oracle: Model
) -> None:
    ids = TEXT[:250]
    with torch.inference_mode():
        log_p = oracle(family)(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = log_p[torch.arange(249), torch.tensor(ids[1:])].numpy()
    assert np.allclose(run(family, 2).logp, wanted, atol=1e-4)
