"""Some consecutive layers of one model with their KV cache: what a pipeline stage computes. Knows no other span."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, overload

import torch
from torch import Tensor
from torch.nn import functional

from .blocks import Block, Experts, Map
from .checkpoint import Checkpoint
from .config import ModelConfig, read_config
from .device import upload
from .families import Loader
from .graphs import CudaGraphs, Decoder, eagerly
from .kv import KVCache
from .model import ADAPTER
from .pool import BLOCK
from .shard import SlicedCheckpoint, share_of
from .step import Row, Step, calls, check_rows, plan, rope_table

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["DTYPES", "Row", "Span"]

# Of activations, keys and values; with int8 only matrices are int8.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}


class Span:
    """Layers `first` to `last` - 1; the first span also holds the embedding, the last one final norm and head."""

    crossed = False  # of an encoder-decoder
    reads: type[Loader] = Loader

    def __init__(
        self,
        config: ModelConfig,
        first: int,
        blocks: Sequence[Block],
        cache: KVCache,
        rope: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.first = first
        self.last = first + len(blocks)
        self.dtype = dtype
        self.device = device
        self.bytes = 0  # of weights
        self.computed = 0  # layers, and times that the head was used; to be read while a step runs
        self.embedding: Map | None = None
        self.positions: Tensor | None = None
        self.final_norm: Map | None = None
        self.output: Map | None = None
        self._blocks = blocks
        self._cache = cache
        self._rope = rope
        self._own = config  # of what is here: less than the model's with `shard`
        self._adapter: Adapter | None = None  # runs the layers instead of blocks of ours
        self._decoder: Decoder | None = None  # runs steps of one token a row
        self._call = 0  # tokens of each call, where it is always the same

    @classmethod
    def load(
        cls,
        path: str | Path,
        first: int,
        last: int,
        *,
        dtype: str = "fp32",
        device: str = "cpu",
        blocks: int,
        progress: Callable[[int, int], None] | None = None,
        adapter: bool = False,
        packed: bool = False,
        deterministic: int = 0,
        shard: tuple[int, int] = (0, 1),
        graphs: bool | None = None,
    ) -> Self:
        """Reads these layers' tensors, and no others, from a Hugging Face directory.

        `blocks` sizes the KV cache (16 tokens each); `progress` is told (parts read, parts in all), a part being a
        layer, the embedding or the head. `adapter` runs a family of ours on transformers' layers as well. `packed`
        lays matrices out for this machine's processor, which is faster. `deterministic` > 0 computes so many tokens at
        a time, always, so that a token's result has the same bits whatever is computed with it. `shard`: the part of
        one rank of several (see RankSpan). `graphs`: steps of one token a row run in a few padded shapes, recorded
        where the device can (by default on CUDA alone).
        Raises CheckpointError for the directory, ValueError for the arguments.
        """
        config = read_config(Path(path), adapter=adapter)
        cls._check(config, first, last, dtype, blocks, deterministic)
        kind, place = DTYPES[dtype], torch.device(device)
        own = share_of(config, *shard)
        if config.family == ADAPTER:
            return cls._adapted(Path(path), config, first, last, kind, place, blocks, progress)
        if config.crossed is not cls.crossed:
            said = "an" if config.crossed else "no"
            raise ValueError(f"{path} is {said} encoder-decoder; T5Span is for those")
        checkpoint = Checkpoint(path) if shard[1] == 1 else SlicedCheckpoint(path, config, *shard)
        loader = cls.reads(checkpoint, own, kind, place, int8=dtype == "int8", packed=packed)
        total = last - first + (first == 0) + (last == config.layers)
        tell = progress or (lambda done, total: None)
        tell(0, total)
        layers = []
        for layer in range(first, last):
            layers.append(loader.block(layer))
            tell(len(layers), total)
        padded = place.type == "cuda" if graphs is None else graphs
        cache = KVCache(last - first, blocks, own.kv_heads, own.head_dim, kind, place, spare=int(padded))
        longest = min(config.context, blocks * BLOCK)
        rope = rope_table(config, longest, kind, place) if config.ropes else None
        span = cls(config, first, layers, cache, rope, dtype=kind, device=place)
        span._own = own
        for done, _ in enumerate(span._read_ends(loader), len(layers) + 1):
            tell(done, total)
        span.bytes = loader.bytes
        span._fix(deterministic)
        if padded and span._steady(shard[1]):
            span._decoder = Decoder(own, rope, cache, kind, CudaGraphs(place) if place.type == "cuda" else eagerly)
        return span

    @staticmethod
    def _check(config: ModelConfig, first: int, last: int, dtype: str, blocks: int, deterministic: int) -> None:
        if not 0 <= first < last <= config.layers:
            raise ValueError(f"layers {first}:{last} are not a span of the model's {config.layers} layers")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if blocks < 1:
            raise ValueError(f"{blocks} KV blocks hold no token; give at least 1")
        if config.family == ADAPTER and dtype == "int8":
            raise ValueError(
                "dtype 'int8' is of our own layers, and this model runs on transformers'; use fp32 or bf16"
            )
        if config.family == ADAPTER and deterministic:
            raise ValueError("deterministic is of our own layers, and this model runs on transformers'; leave it out")

    def _steady(self, ranks: int) -> bool:
        """Whether a step's kernels depend on its shapes alone, so that it can be recorded: experts choose rows, ranks
        talk to each other, and what is deterministic has a shape of its own."""
        return not (self.crossed or self._call or ranks > 1 or any(isinstance(b.mlp, Experts) for b in self._blocks))

    def _read_ends(self, loader: Loader) -> Iterator[None]:
        """Embedding and head, where they are of this span; one turn for each."""
        if self.is_first and self.is_last and loader.tied:
            self.embedding, self.output = loader.tied_ends()
        if self.is_first:
            self.embedding = self.embedding or loader.embedding()
            self.positions = loader.positions()
            yield
        if self.is_last:
            self.final_norm = loader.final_norm()
            self.output = self.output or loader.head()
            yield

    def _fix(self, tokens: int) -> None:
        self._call = tokens
        for block in self._blocks:
            if isinstance(block.mlp, Experts):
                block.mlp.fixed = tokens > 0

    @classmethod
    def _adapted(
        cls,
        path: Path,
        config: ModelConfig,
        first: int,
        last: int,
        dtype: torch.dtype,
        device: torch.device,
        blocks: int,
        progress: Callable[[int, int], None] | None,
    ) -> Self:
        """A span that runs on transformers' layers, which keep their own cache under the same block ids."""
        from .adapter import Adapter

        total = last - first
        tell = (lambda done: progress(done, total)) if progress else (lambda done: None)
        tell(0)
        cache = KVCache(0, blocks, config.kv_heads, config.head_dim, dtype, device)
        span = cls(config, first, (), cache, None, dtype=dtype, device=device)
        span.last = last
        span._adapter = Adapter(path, config, first, last, dtype=dtype, device=device, blocks=blocks, tell=tell)
        cache.bytes_per_block = span._adapter.store.bytes_per_block
        span.bytes = span._adapter.bytes
        return span

    @property
    def is_first(self) -> bool:
        """Takes token ids."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Has the head."""
        return self.last == self.config.layers

    @property
    def blocks(self) -> int:
        """KV blocks, of 16 tokens each."""
        return self._cache.blocks

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of keys and values of 16 tokens in all layers of this span."""
        return self._cache.bytes_per_block

    @overload
    def forward(self, rows: Sequence[Row], x: Tensor, *, ffn_input: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, rows: Sequence[Row], x: Tensor, *, ffn_input: Literal[True]) -> tuple[Tensor, Tensor]: ...

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], x: Tensor, *, ffn_input: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """One step. `x` holds the rows' tokens one after the other: ids [n] on the first span, else hidden [n, hidden].

        Returns hidden [n, hidden], and with `ffn_input` also what entered the last layer's MLP [n, hidden], which is
        kNN-LM's key (Khandelwal et al. 2020). Writes keys and values into the rows' blocks. `x` is left as it was.
        Raises ValueError for rows that do not fit; then nothing was written.
        """
        check_rows(rows, x.shape[0], self.config.context, self._cache.blocks)
        hidden, entered = self._run(rows, x, ffn_input)
        return (hidden, entered) if ffn_input else hidden

    def _run(self, rows: Sequence[Row], x: Tensor, ffn_input: bool) -> tuple[Tensor, Tensor]:
        """What leaves the last layer, and (where it is asked for) what entered its MLP."""
        if self._adapter is not None:
            made = self._adapter.forward(rows, x, ffn_input)
            self.computed += self.last - self.first
            return made
        x = upload(x, self.device)
        if self._decoder is not None:
            done = self.computed + len(self._blocks)
            replayed = self._decoder.run(rows, x, self._layers)
            if replayed is not None:
                self.computed = done
                return replayed
        if not self._call:
            return self._layers(x, self._plan(rows))
        parts: list[tuple[Tensor, Tensor]] = []
        for places, count, step in calls(rows, self._call, self._own, self._rope, self.dtype, self.device):
            hidden, entered = self._layers(x[places], step)
            parts.append((hidden[:count], entered[:count]))
        both = [torch.cat(some) for some in zip(*parts, strict=True)]
        return both[0], both[1]

    def _plan(self, rows: Sequence[Row]) -> Step:
        return plan(rows, self._own, self._rope, self.dtype, self.device)

    def _layers(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """What leaves the last layer, and what entered its MLP."""
        if self.embedding is None:
            hidden = x.to(self.dtype)
        else:
            hidden = self.embedding(x)
            if self.config.embedding_scale != 1.0:
                # Rounded to the weights' dtype, as Gemma was trained.
                hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=self.dtype)
            if self.positions is not None:
                hidden = hidden + self.positions.index_select(0, step.positions)
        entered = hidden
        for layer, block in enumerate(self._blocks):
            hidden, entered = block(hidden, step, self._cache, layer)
            self.computed += 1
        return hidden, entered

    @torch.inference_mode()
    def head(self, hidden: Tensor, want: Tensor | Sequence[int] | None = None) -> Tensor:
        """Final norm and head of the tokens `want` (all by default) of hidden [n, hidden] -> fp32 logits [m, vocab]."""
        adapted = self._adapter is not None and self.is_last
        if not adapted and (self.final_norm is None or self.output is None):
            raise ValueError(f"layers {self.first}:{self.last} hold no head; only the last span has it")
        if want is not None:
            hidden = hidden[upload(torch.as_tensor(want, dtype=torch.long), hidden.device)]
        self.computed += 1
        return self._head(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        if self._adapter is not None:
            return self._adapter.head(hidden).float()
        if self._call:
            parts = [
                self._logits(functional.pad(part, (0, 0, 0, self._call - len(part))))[: len(part)]
                for part in hidden.split(self._call)
            ]
            return torch.cat(parts)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.final_norm is not None and self.output is not None
        logits = self.output(self.final_norm(hidden)).float()
        cap = self.config.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
