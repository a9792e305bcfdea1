"""Ranks of spans as threads of this process, over gloo as in processes of their own; and chains of such spans."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.parallel import Group
from ralmq.workers.engine.ranked import RankSpan
from ralmq.workers.engine.span import Row, Span

CPU = torch.device("cpu")


@contextmanager
def ranked(path: Path, size: int, first: int, last: int, **options: Any) -> Iterator[tuple[Span, list[Group]]]:
    """Rank 0 of `size` and every rank's group; a plain span and no group for one rank."""
    if size == 1:
        yield Span.load(path, first, last, **options), []
        return
    store = dist.HashStore()
    groups: dict[int, Group] = {}
    failures: list[BaseException] = []
    ready = threading.Barrier(size)

    def serve(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            span = RankSpan.load(path, first, last, shard=(rank, size), **options)
            groups[rank] = Group(rank, size, store, CPU)
            span.join(groups[rank])
            ready.wait(60)
            span.serve()
        except BaseException as error:
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    try:
        span = RankSpan.load(path, first, last, shard=(0, size), **options)
        groups[0] = Group(0, size, store, CPU)
        span.join(groups[0])
        ready.wait(60)
        yield span, [groups[rank] for rank in range(size)]
        span.end()
    finally:
        for thread in threads:
            thread.join(30)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)


class Pipeline:
    """Spans one after the other, each of them some ranks."""

    def __init__(self, spans: Sequence[Span], groups: Sequence[list[Group]]) -> None:
        self.spans = spans
        self.groups = groups

    def logits(self, rows: Sequence[Row], x: torch.Tensor) -> torch.Tensor:
        for span in self.spans:
            x = span.forward(rows, x)
        return self.spans[-1].head(x)

    def greedy(self, prompt: torch.Tensor, tokens: int) -> tuple[list[int], torch.Tensor]:
        """Ids, and the logits [tokens, vocab] that each was chosen from."""
        blocks = list(range(-(-(len(prompt) + tokens) // 16)))
        made = [self.logits([Row(0, len(prompt), blocks)], prompt)[-1]]
        ids = [int(made[-1].argmax())]
        for position in range(len(prompt), len(prompt) + tokens - 1):
            made.append(self.logits([Row(position, 1, blocks)], torch.tensor(ids[-1:]))[0])
            ids.append(int(made[-1].argmax()))
        return ids, torch.stack(made)


@contextmanager
def pipeline(path: Path, ranks: int, stages: int, **options: Any) -> Iterator[Pipeline]:
    """All layers of a model over `stages` spans of `ranks` ranks each."""
    layers = read_config(path).layers
    cuts = [layers * place // stages for place in range(stages + 1)]
    with ExitStack() as stack:
        made = [
            stack.enter_context(ranked(path, ranks, first, last, **{"blocks": 24, **options}))
            for first, last in itertools.pairwise(cuts)
        ]
        yield Pipeline([span for span, _ in made], [groups for _, groups in made])
