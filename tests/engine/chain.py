"""Spans of one model run one after the other in this process, as a pipeline would; and what transformers says."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from checkpoints import VOCAB
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.span import Row, Span
from transformers import PreTrainedModel


class Chain:
    """`parts` spans of nearly equal length; `forward` gives what the last one returns."""

    def __init__(self, path: Path, parts: int = 1, blocks: int = 64) -> None:
        layers = read_config(path).layers
        cuts = [layers * i // parts for i in range(parts + 1)]
        self.spans = [Span.load(path, first, last, blocks=blocks) for first, last in itertools.pairwise(cuts)]

    def forward(self, rows: Sequence[Row], ids: torch.Tensor) -> torch.Tensor:
        x = ids
        for span in self.spans:
            x = span.forward(rows, x)
        return x

    def logits(self, rows: Sequence[Row], ids: torch.Tensor) -> torch.Tensor:
        """[n, vocab] of every token of the step."""
        return self.spans[-1].head(self.forward(rows, ids))

    def decode(self, ids: torch.Tensor, prefill: int, blocks: list[int]) -> torch.Tensor:
        """Logits [n, vocab] of one sequence: `prefill` tokens in one step, the others one by one."""
        out = [self.logits([Row(0, prefill, blocks)], ids[:prefill])]
        for at in range(prefill, len(ids)):
            out.append(self.logits([Row(at, 1, blocks)], ids[at : at + 1]))
        return torch.cat(out)


def random_ids(n: int, seed: int = 0, low: int = 0) -> torch.Tensor:
    """[n] ids of the tiny checkpoints, from `low` on."""
    return torch.randint(low, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits [n, vocab]."""
    return model(ids[None]).logits[0]
