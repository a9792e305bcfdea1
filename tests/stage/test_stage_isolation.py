"""What one request brings never harms another: states that are not finite, large options, odd checkpoints."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ralmq.errors import Refused, WorkerFailed
from ralmq.workers.hooks import LogitsHook
from ralmq.workers.stage.worker import Stage
from safetensors.torch import load_file, save_file
from stage.pipelines import Cluster, cluster, generated, prompts, stages


class Nothing(LogitsHook):
    """Changes nothing."""

    name = "x"

    def __call__(self, tokens: Any, values: Any, params: dict[str, Any]) -> Any:
        return values


SICK = 7  # the token whose embedding is not finite
PROMPTS = [[token + (token == SICK) for token in prompt] for prompt in prompts(5, seed=11)]


def served(path: Path, body: Callable[[Cluster], Any], **options: Any) -> None:
    async def main() -> None:
        async with cluster(*stages(path, 2, **options)) as running:
            await body(running)
            await running.settled()

    asyncio.run(main())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_states_that_are_not_finite_end_their_own_request(
    family: str, value: float, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Before, beside and after it others have their tokens, in the KV blocks that it had as well."""
    path = shutil.copytree(checkpoint(family), tmp_path / family)
    file = path / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight", "embed_in.weight"))]
    head = {"gpt2": "lm_head.weight"}.get(family)
    if head is not None and head not in tensors:  # tied: a head of its own, or each logit of the sick token is sick
        tensors[head] = tensors[name].clone()
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors[name][SICK] = value
    save_file(tensors, file, metadata={"format": "pt"})

    async def body(running: Cluster) -> None:
        wanted = [(await generated(running.client, prompt, max_tokens=12)).tokens for prompt in PROMPTS]
        for sick in ([SICK] * 60, [3, SICK, 4, 5], [*range(8, 60), SICK]):
            mixed = [generated(running.client, prompt, max_tokens=12) for prompt in PROMPTS]
            ends = await asyncio.gather(generated(running.client, sick, max_tokens=12), *mixed, return_exceptions=True)
            assert isinstance(ends[0], WorkerFailed) and "not finite" in ends[0].message
            assert [end.tokens for end in ends[1:]] == wanted  # type: ignore[union-attr]
            fresh = await asyncio.gather(
                *[generated(running.client, p[::-1], max_tokens=12, logprobs=True) for p in PROMPTS]
            )
            assert all(torch.tensor(one.logprobs).isfinite().all() for one in fresh)

    served(path, body, kv_mib=1, max_rows=6)


def test_large_options_travel_or_are_refused(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster) -> None:
        bias = [[token % 128, 0.5] for token in range(1024)]
        alone = generated(running.client, [5, 6], max_tokens=30)
        many = [generated(running.client, [5, seed], max_tokens=3, logit_bias=bias) for seed in range(60)]
        ends = await asyncio.gather(alone, *many)
        assert [len(end.tokens) for end in ends] == [30] + [3] * 60
        with pytest.raises(Refused, match=r"the options have [0-9]+ bytes, at most 65536"):
            await generated(
                running.client, [5], max_tokens=3, logit_bias=[[1, 0.1]] * 1024, hooks={"x": {"a": "b" * 70_000}}
            )

    served(checkpoint("llama"), body, hooks=f"{__name__}:Nothing")


def test_an_end_of_text_behind_the_vocabulary(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("gpt2"), tmp_path / "cut")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": 50256}))

    async def body(running: Cluster) -> None:
        task = {"temperature": 1.0, "min_tokens": 5, "ignore_eos": False}
        assert len((await generated(running.client, [5, 6], max_tokens=8, **task)).tokens) == 8

    served(path, body)


def test_a_row_that_cannot_be_sampled_fails_alone(checkpoint: Callable[[str], Path]) -> None:
    async def body(running: Cluster) -> None:
        await generated(running.client, [3], max_tokens=1)
        stage = running.hosts[1].worker
        assert isinstance(stage, Stage)
        last = stage._runner.last
        assert last is not None
        start = last.start

        def started(key: Any, prompt: Any, params: Any) -> None:
            start(key, prompt, params)
            if prompt[0] == 9:
                object.__setattr__(last._sequences[key].sampling, "top_k", None)

        last.start = started  # type: ignore[method-assign]
        tasks = [generated(running.client, [token, 4], max_tokens=9, temperature=1.0, seed=1) for token in (8, 9, 10)]
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(ends[1], WorkerFailed) and "cannot be sampled: TypeError" in ends[1].message
        assert [len(end.tokens) for end in (ends[0], ends[2])] == [9, 9]  # type: ignore[union-attr]

    served(checkpoint("llama"), body)


def test_stages_that_cut_their_calls_differently_form_no_pipeline(checkpoint: Callable[[str], Path]) -> None:
    async def main() -> None:
        first, second = stages(checkpoint("llama"), 2, deterministic=8)[0], stages(checkpoint("llama"), 2)[1]
        async with cluster(first, second) as running:
            (line,) = (await running.client.status())["pipelines"]
            assert not line["formed"] and line["missing"]

    asyncio.run(main())
