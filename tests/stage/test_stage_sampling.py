"""Sampling options over real pipelines: the same on 1 and 3 stages, and as transformers generates with them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ralmq.client.client import Client
from ralmq.errors import Refused, WorkerFailed
from ralmq.workers.hooks import LogitsHook
from stage.pipelines import MODEL, Cluster, cluster, generated, lm, prompts, scored, stages
from transformers import PreTrainedModel

FAMILY, TOKENS = "llama", 24
PROMPTS = prompts(6, seed=2)
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": [[5, 3.0], [9, -100.0]], "min_tokens": 20, "stop_ids": list(range(64))},
    {"repetition_penalty": 1.4, "top_logprobs": 5},
    {"temperature": 1.0, "hooks": {"only": {"ids": [3, 60, 61, 62, 100]}}},
]


class Only(LogitsHook):
    """Leaves some ids, and counts its calls."""

    name = "only"
    calls = 0

    def check(self, params: dict[str, Any]) -> None:
        if not isinstance(params.get("ids"), list):
            raise ValueError("ids: give a list of token ids")

    def __call__(self, tokens: Any, values: Any, params: dict[str, Any]) -> Any:
        Only.calls += 1
        if len(tokens) == params.get("fail_at"):
            raise RuntimeError("worn out")
        kept = np.full_like(values, -np.inf)
        kept[params["ids"]] = values[params["ids"]]
        return kept


HOOK = f"{__name__}:Only"


def served(path: Path, body: Callable[[Cluster], Any], count: int = 2, **options: Any) -> Any:
    async def main() -> Any:
        async with cluster(*stages(path, count, **options)) as running:
            result = await body(running)
            await running.settled()
            return result

    return asyncio.run(main())


async def bodies(client: Client, prompt: list[int], task: dict[str, Any]) -> list[dict[str, Any]]:
    body = {"max_tokens": TOKENS, "seed": 77, **task}
    ids = np.asarray(prompt, np.int32)
    return [part.body async for part in client.stream(f"lm:{MODEL}", body, tensors=[ids], deadline=60)]


def test_the_same_seed_gives_the_same_tokens_on_1_and_3_stages(checkpoint: Callable[[str], Path]) -> None:
    """Alone; and what a batch gives has the same tokens where no near tie decides."""

    async def body(running: Cluster) -> Any:
        pairs = list(zip(PROMPTS, SAMPLED, strict=True))
        alone = [await bodies(running.client, *pair) for pair in pairs]
        batched = await asyncio.gather(*[bodies(running.client, *pair) for pair in pairs])
        return alone, [[part["token"] for part in parts] for parts in batched]

    one, three = (served(checkpoint(FAMILY), body, count, hooks=HOOK) for count in (1, 3))
    assert one[0] == three[0]
    assert [[part["token"] for part in parts] for parts in one[0]] == one[1] == three[1]
    biased, hooked = ([part["token"] for part in one[0][place]] for place in (3, 5))
    assert 9 not in biased and 20 <= len(biased) <= TOKENS
    assert set(hooked) <= {3, 60, 61, 62, 100} and len(set(hooked)) > 2
    assert all(len(part["top_logprobs"]) == 5 for part in one[0][4])


@pytest.mark.parametrize("penalty", [0.8, 1.2, 1.8])
def test_greedy_with_a_repetition_penalty_is_what_transformers_generates(
    penalty: float, checkpoint: Callable[[str], Path], oracle: Callable[[str], PreTrainedModel]
) -> None:
    async def body(running: Cluster) -> Any:
        options = {"repetition_penalty": penalty, "max_tokens": TOKENS}
        return [await generated(running.client, prompt, **options) for prompt in PROMPTS]

    same = 0
    for prompt, answer in zip(PROMPTS, served(checkpoint(FAMILY), body), strict=True):
        ids = torch.tensor([prompt])
        wanted = oracle(FAMILY).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :]
        same += wanted.tolist() == answer.tokens
    assert same >= len(PROMPTS) - 1, "one near tie at most"


def test_a_replay_of_a_sampled_sequence_goes_on_as_it_would_have(checkpoint: Callable[[str], Path]) -> None:
    task = {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.7, "ignore_eos": True, "min_p": 0.01}

    async def body(running: Cluster) -> None:
        prompt = PROMPTS[0]
        whole = [part["token"] for part in await bodies(running.client, prompt, task)]
        for cut in (1, 7, 20):
            rest = {**task, "prompt": len(prompt), "max_tokens": TOKENS - cut}
            again = await bodies(running.client, prompt + whole[:cut], rest)
            assert [part["token"] for part in again] == whole[cut:]

    served(checkpoint(FAMILY), body)


def test_hooks_are_checked_before_prefill_and_a_failure_ends_one_request(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster) -> None:
        client, before = running.client, Only.calls
        for hooks, said in (
            ({"none": {}}, "hook none is unknown, there are only: start the stages with -o hooks="),
            ({"only": {}}, "hook only refuses its parameters: ids: give a list"),
            ({"only": 5}, "hooks.only: Input should be a valid dictionary"),
        ):
            with pytest.raises(Refused, match=said):
                await bodies(client, PROMPTS[0], {"hooks": hooks})
        assert [host.worker._runner.steps for host in running.hosts] == [0, 0] and Only.calls == before  # type: ignore[attr-defined]
        failing = {"only": {"ids": [3], "fail_at": len(PROMPTS[0]) + 5}}
        plain, ended, other = await asyncio.gather(
            bodies(client, PROMPTS[1], {"ignore_eos": True}),
            bodies(client, PROMPTS[0], {"hooks": failing, "ignore_eos": True}),
            bodies(client, PROMPTS[2], {"hooks": {"only": {"ids": [4]}}}),
            return_exceptions=True,
        )
        assert len(plain) == TOKENS and [part["token"] for part in other] == [4] * TOKENS  # type: ignore[arg-type, index]
        assert isinstance(ended, WorkerFailed) and "hook only: worn out" in ended.message

    served(checkpoint(FAMILY), body, hooks=HOOK)


def test_a_score_without_states_says_the_same(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster) -> None:
        ids = (PROMPTS[0] * 8)[:200]
        _, log_p = await scored(running.client, ids)
        parts = [part async for part in lm(running.client, ids, mode="score", states=False, top_logprobs=3)]
        bare, top, values = (np.concatenate([p.tensors[n].numpy() for p in parts]) for n in range(3))
        assert np.array_equal(bare, log_p) and top.shape == values.shape == (len(log_p), 3)
        assert all(len(part.tensors) == 3 for part in parts)
        assert (values[:, 0] >= values[:, 1]).all() and (values[:, 0] >= bare).all()
        hit = top == np.asarray(ids[1:])[:, None]
        assert np.allclose(values[hit], bare[hit.any(1)], atol=1e-6) and hit.any()

    served(checkpoint(FAMILY), body)
