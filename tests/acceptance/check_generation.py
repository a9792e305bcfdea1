"""Exactness, seeds, interval, lambda and mixing, against transformers and a real index of the model's own states."""

import asyncio
import math
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ralmq
import torch
from checkpoints import FAMILIES, VOCAB, tiny
from checks import Line, check
from ralmq.client.client import Client
from ralmq.workers.datastore.build import build_datastore
from ralmq.workers.datastore.sources import Document
from serving import Process, broker, free_url, until, worker
from stage.offline import Offline
from stage.pipelines import MODEL, Answered, cluster, generated, prompts, scored, stages
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

APART = ("gpt2", "llama", "qwen3")  # with a process for each stage; the others have a thread each
CLOSE = 1e-3  # of all tokens, where the reference's two best are within MARGIN
TOKENS, MARGIN, TEMPERATURE = 40, 1e-4, 200.0
PROMPTS = prompts(8)
TEXT = np.random.default_rng(2).integers(0, VOCAB, 250).tolist()


def started(stack: ExitStack, folder: Path, path: Path, count: int) -> str:
    """A broker and one pipeline of `count` stages, a process each; the broker's address."""
    url = free_url()
    stack.enter_context(broker(folder, url))
    for place in range(count):
        options = {"model": path, "stage": f"{place}/{count}", "name": MODEL}
        stack.enter_context(worker(folder, url, "stage", **options))
    return url


async def answers(folder: Path, path: Path, count: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy tokens of PROMPTS, all at once and then the first alone; hidden states and log p of TEXT."""
    with ExitStack() as stack:
        async with ralmq.connect(started(stack, folder, path, count), wait=30) as client:
            await client.request(f"lm:{MODEL}", {"max_tokens": 1}, tensors=[np.array([5], np.int32)], wait_service=60)
            batched = await asyncio.gather(*[generated(client, prompt, max_tokens=TOKENS) for prompt in PROMPTS])
            alone = await generated(client, PROMPTS[0], max_tokens=TOKENS)
            return [answer.tokens for answer in (*batched, alone)], list(await scored(client, TEXT))


def logits_of(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """transformers' logits [tokens, vocab] at the place of each token, given those before it."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def compared(model: PreTrainedModel, found: list[list[int]]) -> tuple[int, int]:
    """Tokens that are not transformers' best, given those before, and near ties, where either is right."""
    wrong = close = 0
    for prompt, tokens in zip([*PROMPTS, PROMPTS[0]], found, strict=True):
        best = logits_of(model, prompt, tokens).topk(2)
        sure = best.values[:, 0] - best.values[:, 1] > MARGIN
        close += int((~sure).sum())
        wrong += int((best.indices[sure, 0] != torch.tensor(tokens)[sure]).sum())
    return wrong, close


@check
async def exactness(folder: Path) -> AsyncIterator[Line]:
    for family in APART:
        path = tiny(family, folder / family)
        model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        whole: list[np.ndarray] = []
        for count in (1, 2, 3, 4):
            found, states = await answers(folder, path, count)
            wrong, close = compared(model, found)
            total = sum(map(len, found))
            whole = whole or states
            equal = all(np.array_equal(a, b) for a, b in zip(whole, states, strict=True))
            yield Line(
                f"{family}, {count} stages: greedy tokens that are not transformers'",
                f"0 of {9 * TOKENS}; near ties < 1 %",
                f"{wrong} of {total}; near ties {close}",
                wrong == 0 and total == 9 * TOKENS and close < 0.01 * total,
            )
            same = "same bits" if equal else "other bits"
            yield Line(f"{family}, {count} stages: states and log p of a text", "same bits as 1 stage", same, equal)


async def every_way(path: Path, count: int) -> tuple[list[tuple[list[int], Answered]], int, int]:
    """Prompts and greedy answers of a pipeline: batched with 7 others, prompts in chunks of 16, the prefix cache cold
    and hot, alone, and with KV blocks for a part of them; then tokens reused, and how often blocks were given back."""
    task = {"max_tokens": TOKENS, "logprobs": True}
    found: list[tuple[list[int], Answered]] = []
    members = stages(path, count, chunk=16)
    async with cluster(*members) as running:
        for _ in ("cold", "hot"):
            answered = await asyncio.gather(*[generated(running.client, prompt, **task) for prompt in PROMPTS])
            found += zip(PROMPTS, answered, strict=True)
        found.append((PROMPTS[1], await generated(running.client, PROMPTS[1], **task)))
        leader = members[0]._leader
        assert leader is not None
        reused = leader.memory.reused
    tight = stages(path, count, max_rows=2)  # KV blocks for two whole contexts
    async with cluster(*tight) as running:
        longer = [generated(running.client, prompt, **{**task, "max_tokens": 2 * TOKENS}) for prompt in PROMPTS]
        found += zip(PROMPTS, await asyncio.gather(*longer), strict=True)
        leader = tight[0]._leader
        assert leader is not None
        return found, reused, leader.preempted


@check
async def every_family(folder: Path) -> AsyncIterator[Line]:
    total = all_close = 0
    for family in FAMILIES:
        path = tiny(family, folder / family)
        model = AutoModelForCausalLM.from_pretrained(path).float().eval()
        wrong = close = made = 0
        worst, reused, preempted = 0.0, [], []
        for count in (1, 2, 3, 4):
            found, again, anew = await every_way(path, count)
            reused.append(again)
            preempted.append(anew)
            for prompt, answer in found:
                logits, tokens = logits_of(model, prompt, answer.tokens), torch.tensor(answer.tokens)
                best = logits.topk(2)
                sure = best.values[:, 0] - best.values[:, 1] > MARGIN
                wrong += int((best.indices[sure, 0] != tokens[sure]).sum())
                close += int((~sure).sum())
                made += len(tokens)
                log_p = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                worst = max(worst, float((log_p - torch.tensor(answer.logprobs)).abs().max()))
        total, all_close = total + made, all_close + close
        what = f"{family}, 1 to 4 stages, alone, batched, in chunks, cache cold and hot, preempted"
        wanted = 4 * (17 + 16) * TOKENS
        shown = f"{wrong} of {made}; near ties {close}"
        yield Line(
            f"{what}: greedy tokens that are not transformers'", f"0 of {wanted}", shown, not wrong and made == wanted
        )
        shown = f"{worst:.1e}; tokens reused {reused}, preempted {preempted}"
        good = worst < 1e-4 and min(reused) > 0 and min(preempted) > 0
        yield Line(f"{family}, the same: largest error of a logprob", "< 1e-4, with reuse and preemption", shown, good)
    yield Line("near ties in all", f"< {CLOSE:.1%} of {total}", f"{all_close}", all_close < CLOSE * total)


@check
async def seeds(folder: Path) -> AsyncIterator[Line]:
    """One sequence at a time, on 1 and 3 stages, a process each."""
    path = tiny("llama", folder / "llama")
    found = []
    for count in (1, 3):
        with ExitStack() as stack:
            async with ralmq.connect(started(stack, folder, path, count), wait=30) as client:
                await client.request(
                    f"lm:{MODEL}", {"max_tokens": 1}, tensors=[np.array([5], np.int32)], wait_service=60
                )
                task = {"max_tokens": TOKENS, "temperature": 1.0, "top_p": 0.95}
                found.append([(await generated(client, PROMPTS[n], seed=n % 4, **task)).tokens for n in range(8)])
    same = sum(a == b for a, b in zip(*found, strict=True))
    yield Line("sampled with the same seed on 1 and 3 stages: equal", "8 of 8", f"{same}", same == 8)


async def with_index(stack: ExitStack, folder: Path, client: Client, url: str) -> Path:
    """Builds the index of 4 documents of random words through the pipeline, and serves it."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = np.random.default_rng(8).integers(3, VOCAB, (4, 300))
    documents = [Document(f"{n}.txt", " ".join(f"w{word}" for word in line)) for n, line in enumerate(words)]
    out = folder / "docs"
    await build_datastore(client, model=MODEL, name="docs", documents=documents, tokenizer=tokenizer, out=out)
    arguments = ("recording_index:Recording", "--broker", url, "-o", f"index={out}")
    shutil.copy(Path(__file__).with_name("recording_index.py"), folder)
    stack.enter_context(Process(folder, "worker", *arguments))

    async def there() -> bool:
        return "search:docs" in (await client.status())["services"]

    await until(there, "search:docs")
    return out


async def recorded(client: Client) -> np.ndarray:
    """The vectors that the index was asked for since the last time, [n, d]."""
    reply = await client.request("search:docs", {"recorded": True})
    return np.array(reply.tensors[0].numpy()) if reply.tensors else np.empty((0, 0), np.float32)


def knn(interval: int, staleness: int = 0, weight: float = 0.4) -> dict[str, Any]:
    settings = {"index": "docs", "k": 8, "knn_temperature": TEMPERATURE, "knn_lambda": weight}
    return {**settings, "interval": interval, "staleness": staleness}


@check
async def retrieval_in_the_loop(folder: Path) -> AsyncIterator[Line]:
    prompt = PROMPTS[2]
    path = tiny("llama", folder / "llama")
    with ExitStack() as stack:
        url = started(stack, folder, path, 2)
        async with ralmq.connect(url, wait=30) as client:
            await client.request(f"lm:{MODEL}", {"max_tokens": 1}, tensors=[np.array([5], np.int32)], wait_service=60)
            offline = Offline(await with_index(stack, folder, client, url), VOCAB, TEMPERATURE)
            for tokens in (10, 64):
                sent = []
                for interval in (1, 3, 8):
                    await generated(client, prompt, max_tokens=tokens, retrieve=knn(interval))
                    sent.append(len(await recorded(client)))
                wanted = [math.ceil(tokens / interval) for interval in (1, 3, 8)]
                yield Line(f"query vectors for {tokens} tokens, r = 1, 3, 8", f"{wanted}", f"{sent}", sent == wanted)
            for sampling in ({}, {"temperature": 1.0, "seed": 4}):
                plain = await generated(client, prompt, max_tokens=64, **sampling)
                zero = await generated(client, prompt, max_tokens=64, retrieve=knn(1, weight=0.0), **sampling)
                other = sum(a != b for a, b in zip(plain.tokens, zero.tokens, strict=True))
                yield Line(f"tokens that lambda = 0 changes, {sampling or 'greedy'}", "0 of 64", f"{other}", not other)
            await recorded(client)
            for interval, staleness in ((1, 0), (3, 0), (1, 1), (1, 3)):
                retrieve = knn(interval, staleness)
                answer = await generated(client, prompt, max_tokens=64, logprobs=True, retrieve=retrieve)
                vectors = await recorded(client)
                _, log_p = await scored(client, prompt + answer.tokens)
                worst = max(offline.errors(answer.tokens, answer.logprobs, log_p[len(prompt) - 1 :], vectors, retrieve))
                name = f"mixing against numpy, r = {interval}, s = {staleness}: largest error of a p"
                yield Line(name, "< 1e-6", f"{worst:.1e}", worst < 1e-6)
