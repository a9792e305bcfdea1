"""Calls of one fixed shape: a token's result has the same bits whatever is computed with it."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, VOCAB, tiny
from ralmq.workers.engine.pool import BLOCK
from ralmq.workers.engine.span import Row, Span

LENGTHS = (37, 5, 50, 1, 18)


def logits(span: Span, rows: Sequence[Row], ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of each token, one tensor [count, vocab] a row."""
    hidden = span.forward(rows, torch.cat(list(ids)))
    return list(span.head(hidden).split([row.count for row in rows]))


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_in_a_batch_whole_and_in_chunks(family: str, tmp_path: Path) -> None:
    """Random ways to cut five sequences into steps; all give the bits of one token after the other, alone."""
    path = tiny(family, tmp_path / family)
    texts = [torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    alone: list[torch.Tensor] = []
    span = Span.load(path, 0, 4, blocks=40, deterministic=8, packed=True)
    for text in texts:
        steps = [logits(span, [Row(at, 1, [9, 3, 7, 1])], [text[at : at + 1]])[0] for at in range(len(text))]
        alone.append(torch.cat(steps))
    for seed in range(3):
        chance = random.Random(seed)
        free = chance.sample(range(40), 40)
        tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in LENGTHS]
        done, made = [0] * len(texts), [torch.empty(0, VOCAB) for _ in texts]
        while any(at < len(text) for at, text in zip(done, texts, strict=True)):
            open_ = [n for n, text in enumerate(texts) if done[n] < len(text)]
            chosen = chance.sample(open_, chance.randint(1, len(open_)))
            counts = [chance.randint(1, len(texts[n]) - done[n]) for n in chosen]
            rows = [Row(done[n], count, tables[n]) for n, count in zip(chosen, counts, strict=True)]
            given = [texts[n][done[n] : done[n] + count] for n, count in zip(chosen, counts, strict=True)]
            for n, count, found in zip(chosen, counts, logits(span, rows, given), strict=True):
                made[n] = torch.cat((made[n], found))
                done[n] += count
        assert all(torch.equal(a, b) for a, b in zip(alone, made, strict=True))


def test_it_computes_what_the_plain_way_computes(tmp_path: Path) -> None:
    path = tiny("qwen3_moe", tmp_path / "m")
    text = torch.randint(3, VOCAB, (30,), generator=torch.Generator().manual_seed(0))
    plain, fixed = (Span.load(path, 0, 4, blocks=4, deterministic=size) for size in (0, 4))
    rows = [Row(0, 30, [2, 1])]
    hidden, entered = plain.forward(rows, text, ffn_input=True)
    same, also = fixed.forward(rows, text, ffn_input=True)
    torch.testing.assert_close(same, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(also, entered, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fixed.head(same), plain.head(hidden), atol=1e-4, rtol=1e-4)


def test_tokens_that_fill_up_a_call_write_nothing(tmp_path: Path) -> None:
    span = Span.load(tiny("llama", tmp_path / "m"), 0, 4, blocks=3, deterministic=16)
    span.forward([Row(0, 3, [1])], torch.tensor([5, 6, 7]))
    for layer in span._cache._slots:
        assert layer[BLOCK : BLOCK + 3].abs().sum() > 0
        assert not layer[:BLOCK].any() and not layer[BLOCK + 3 :].any()
