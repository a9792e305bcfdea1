"""Layers of any decoder-only architecture on transformers' own modules, fed from our blocks. Imports transformers.

Each call runs the architecture's own forward over this span's layers alone, so that masks, positions and whatever else
its layers ask for are its own; only what enters the first layer and leaves the last is ours.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .foreign import Past, Store
from .model import ModelConfig
from .pool import BLOCK
from .skeleton import Skeleton, hidden_of
from .step import Row

# What enters the first of these that a layer has is what kNN-LM takes as its key.
_MLP = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "moe", "feedforward", "fc1")


class Adapter:
    """Layers `first` to `last` - 1 with their KV blocks. One thread at a time."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        first: int,
        last: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        blocks: int,
        tell: Callable[[int], None],
    ) -> None:
        """Reads this span's tensors alone and tells how many layers are read. CheckpointError where it cannot run."""
        self._config = config
        self._device = device
        self._dtype = dtype
        self._skeleton = Skeleton(path, config, first, last, dtype, device)
        self._entering: Tensor | None = None
        self._leaving: Tensor | None = None
        self._entered: Tensor | None = None
        skeleton = self._skeleton
        for number in range(last - first):
            skeleton.load_layer(number)
            tell(number + 1)
        self._batches = "position_ids" in inspect.signature(skeleton.base.forward).parameters
        shapes = skeleton.probe()
        skeleton.load_outside(first == 0, last == config.layers)
        self.store = Store(shapes, blocks)
        self.bytes = skeleton.bytes
        layers = skeleton.layers
        if first > 0:
            layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)
        mlp = next((getattr(layers[-1], name) for name in _MLP if hasattr(layers[-1], name)), None)
        if mlp is not None:
            mlp.register_forward_pre_hook(self._note)
        self._has_mlp = mlp is not None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((self._entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self._entering})

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._leaving = hidden_of(output)

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered = args[0]

    def forward(self, rows: Sequence[Row], x: Tensor, ffn_input: bool) -> tuple[Tensor, Tensor]:
        """As Span.forward; ids [n] or hidden [n, hidden] -> hidden and (if asked for) the last MLP's input."""
        if ffn_input and not self._has_mlp:
            raise ValueError(f"{type(self._skeleton.layers[-1]).__name__} has no known MLP, whose input is asked for")
        n, hidden = x.shape[0], self._config.hidden
        out = torch.empty(n, hidden, dtype=self._dtype, device=self._device)
        entered = torch.empty_like(out) if ffn_input else out
        for tokens, some in self._groups(rows):
            where = torch.tensor(tokens, device=self._device)
            self._run(some, x.to(self._device).index_select(0, where))
            assert self._leaving is not None
            out.index_copy_(0, where, self._leaving.reshape(-1, hidden))
            if ffn_input:
                assert self._entered is not None
                entered.index_copy_(0, where, self._entered.reshape(-1, hidden))
        self._entering = self._leaving = self._entered = None
        return out, entered

    def _groups(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], list[Row]]]:
        """Rows that run in one call, with the numbers of their tokens: rows of one token together, others alone."""
        single: list[tuple[int, Row]] = []
        start = 0
        for row in rows:
            # An architecture that is not told positions derives them from the length of the cache: one row at a time.
            if row.count == 1 and self._batches:
                single.append((start, row))
            else:
                yield list(range(start, start + row.count)), [row]
            start += row.count
        if single:
            yield [at for at, _ in single], [row for _, row in single]

    def _run(self, rows: Sequence[Row], x: Tensor) -> None:
        """Rows of one length; shorter pasts are padded on the left, as every architecture expects it."""
        count, longest = rows[0].count, max(row.position for row in rows)
        past, new = [], []
        for row in rows:
            slots = [block * BLOCK + place for block in row.blocks for place in range(BLOCK)]
            past.append([0] * (longest - row.position) + slots[: row.position])
            new += slots[row.position : row.position + count]
        first = torch.tensor([row.position for row in rows], device=self._device)[:, None]
        cache = Past(
            self.store,
            torch.tensor(past, dtype=torch.long, device=self._device).view(len(rows), longest),
            torch.tensor(new, device=self._device),
        )
        if x.dim() == 1:
            ids = x.long().view(len(rows), count)
        else:
            ids = torch.zeros(len(rows), count, dtype=torch.long, device=self._device)
            self._entering = x.to(self._dtype).view(len(rows), count, -1)
        seen = torch.arange(longest + count, device=self._device) >= longest - first
        told: dict[str, Any] = {}
        if self._batches:
            told["position_ids"] = first + torch.arange(count, device=self._device)
        self._skeleton.base(input_ids=ids, attention_mask=seen.long(), past_key_values=cache, use_cache=True, **told)

    def head(self, hidden: Tensor) -> Tensor:
        """Everything behind the layers: hidden [n, hidden] -> logits [n, vocab]."""
        return self._skeleton.head(hidden)
