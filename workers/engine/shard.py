"""What one rank of several holds of a model: its sizes, and its slices of the stored tensors. Knows no process.

The split is Megatron-LM's (Shoeybi et al. 2019): queries, keys, values and the MLP's way in by outputs, the ways out by
inputs, embedding and head by tokens. Everything else is whole on each rank.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .checkpoint import ALIGNED, Checkpoint
from .errors import CheckpointError
from .headers import SLAB
from .model import ADAPTER, ModelConfig
from .names import HEAD, NAMES, Names, prefix_of

Range = tuple[int, int]  # the first, and one past the last
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's rows and columns of a tensor that is stored with this shape; None: all of them.

    `zero`: of a rank that is to have zeros, since what is added to a sum counts once.
    """

    shape: tuple[int, ...]
    rows: tuple[Range, ...] | None = None
    columns: tuple[Range, ...] | None = None
    zero: bool = False


def part(n: int, rank: int, size: int) -> Range:
    """Which of n things are a rank's: parts that differ by one at most."""
    return n * rank // size, n * (rank + 1) // size


def fits(config: ModelConfig, size: int) -> bool:
    """Whether so many ranks have equally many heads, and each one kv head at least that no two of its groups share."""
    least = config.experts.intermediate if config.experts is not None else config.intermediate
    heads = config.heads % size == 0 and (config.kv_heads % size == 0 or size % config.kv_heads == 0)
    return heads and size <= min(least, config.intermediate, config.vocab)


def share_of(config: ModelConfig, rank: int, size: int) -> ModelConfig:
    """The sizes of one rank's part. Where there are more ranks than kv heads, several ranks hold the same kv head.

    Raises:
        ValueError: a model that cannot be split so.
    """
    if size == 1:
        return config
    if config.family == ADAPTER:
        raise ValueError("tp is of our own layers, and this model runs on transformers'; leave it out")
    if config.crossed:
        raise ValueError("tp is of decoder-only models, and this is an encoder-decoder; leave it out")
    if not fits(config, size):
        good = ", ".join(str(n) for n in range(1, config.heads + 1) if fits(config, n))
        raise ValueError(
            f"tp={size} does not split {config.heads} heads and {config.kv_heads} kv heads; give one of {good}"
        )
    experts = config.experts
    if experts is not None:
        experts = replace(experts, intermediate=_length(part(experts.intermediate, rank, size)))
    return replace(
        config,
        heads=config.heads // size,
        kv_heads=max(1, config.kv_heads // size),
        intermediate=_length(part(config.intermediate, rank, size)),
        vocab=_length(part(config.vocab, rank, size)),
        experts=experts,
    )


def _length(of: Range) -> int:
    return of[1] - of[0]


class SlicedCheckpoint(Checkpoint):
    """A checkpoint as one rank sees it: each tensor is its slice, and no other bytes of it are read."""

    def __init__(self, path: str | Path, config: ModelConfig, rank: int, size: int) -> None:
        """`config` is of the whole model, which `share_of` takes."""
        super().__init__(path)
        names = NAMES[config.family]
        self._cuts = _Cutter(config, names, prefix_of(self, names), rank, size).cuts

    def slabs(self, name: str, shape: tuple[int, ...], *, whole: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """As Checkpoint.slabs; `shape` is that of the slice."""
        cut = self._cuts.get(NUMBER.sub("{}", name))
        if cut is None:
            yield from super().slabs(name, shape, whole=whole)
            return
        file, entry, dtype = self._checked(name, cut.shape)
        if cut.zero:
            yield 0, torch.zeros(shape, dtype=dtype)
            return
        rows = cut.rows or ((0, cut.shape[0]),)
        columns = cut.columns
        width = sum(map(_length, columns)) if columns else cut.shape[1] if len(cut.shape) == 2 else 1
        assert shape[0] == sum(map(_length, rows)) and shape[1:] in ((), (width,)), (name, shape)
        count = shape[0] if whole else min(shape[0], max(1, SLAB // (width * dtype.itemsize) // ALIGNED) * ALIGNED)
        if len(self._buffer) < count * width * dtype.itemsize:
            self._buffer = torch.empty(max(SLAB, count * width * dtype.itemsize), dtype=torch.uint8)
        # Bytes of a row as it is stored, and those of it that are read, one run after the other.
        stored = (cut.shape[1] if len(cut.shape) == 2 else 1) * dtype.itemsize
        within = [(begin * dtype.itemsize, end * dtype.itemsize) for begin, end in columns] if columns else None
        with file.open("rb", buffering=0) as stream:
            for start in range(0, shape[0], count):
                n = min(count, shape[0] - start)
                data = self._buffer[: n * width * dtype.itemsize]
                filled = 0
                for begin, end in _taken(rows, start, n):
                    filled = self._fill(stream, data, filled, entry.begin, stored, (begin, end), within, name)
                yield start, data.view(dtype).view(n, *shape[1:])

    def _fill(
        self,
        stream: Any,
        data: torch.Tensor,
        filled: int,
        base: int,
        stored: int,
        rows: Range,
        within: list[Range] | None,
        name: str,
    ) -> int:
        """Reads these stored rows, or these bytes of each of them, to place `filled`; returns the place behind."""
        if within is None:
            runs = [(rows[0] * stored, rows[1] * stored)]
        else:
            runs = [(row * stored + begin, row * stored + end) for row in range(*rows) for begin, end in within]
        for begin, end in runs:
            stream.seek(base + begin)
            self._read_all(stream, data[filled : filled + end - begin], name)
            filled += end - begin
        return filled

    def _read_all(self, stream: BinaryIO, into: torch.Tensor, name: str) -> None:
        values: Any = into.numpy()
        buffer = memoryview(values)
        self.read += len(buffer)
        while len(buffer):
            got = stream.readinto(buffer)  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(f"{stream.name}: ends within tensor {name}; download the file again")
            buffer = buffer[got:]


def _taken(ranges: tuple[Range, ...], start: int, count: int) -> Iterator[Range]:
    """Of the things in `ranges`, one range after the other, those from number `start` on, `count` of them."""
    for begin, end in ranges:
        skip = min(start, end - begin)
        start -= skip
        n = min(count, end - begin - skip)
        if n > 0:
            yield begin + skip, begin + skip + n
            count -= n


class _Cutter:
    """Makes the cuts of one rank, by a tensor's name with {} for each number in it."""

    def __init__(self, config: ModelConfig, names: Names, prefix: str, rank: int, size: int) -> None:
        self.cuts: dict[str, Cut] = {}
        self._config = config
        self._names = names
        self._rank = rank
        self._size = size
        at = prefix + names.layer
        self._attention(at)
        self._mlp(at, names.up, names.down, config.intermediate)
        if config.experts is not None:
            self._mlp(at + names.expert, names.expert_up, names.expert_down, config.experts.intermediate)
        tokens = (part(config.vocab, rank, size),)
        for name in (prefix + names.embedding, HEAD):
            self.cuts[name] = Cut((config.vocab, config.hidden), tokens)

    def _attention(self, at: str) -> None:
        config, names, size = self._config, self._names, self._size
        dim = config.head_dim
        heads = config.heads // size * dim
        kv = max(1, config.kv_heads // size) * dim
        first = self._rank * config.kv_heads // size * dim
        queries, keys = (self._rank * heads, (self._rank + 1) * heads), (first, first + kv)
        all_queries, all_keys = config.heads * dim, config.kv_heads * dim
        if len(names.qkv) == 3:
            for name, whole, own in zip(
                names.qkv, (all_queries, all_keys, all_keys), (queries, keys, keys), strict=True
            ):
                self._outputs(at + name, whole, (own,))
        else:
            ranges = (queries, _moved(keys, all_queries), _moved(keys, all_queries + all_keys))
            self._outputs(at + names.qkv[0], all_queries + 2 * all_keys, ranges)
        self._inputs(at + names.out, all_queries, queries)

    def _mlp(self, at: str, up: tuple[str, ...], down: str, intermediate: int) -> None:
        own = part(intermediate, self._rank, self._size)
        if self._names.gated and len(up) == 1:
            self._outputs(at + up[0], 2 * intermediate, (own, _moved(own, intermediate)))
        else:
            for name in up:
                self._outputs(at + name, intermediate, (own,))
        self._inputs(at + down, intermediate, own)

    def _outputs(self, name: str, outputs: int, own: tuple[Range, ...]) -> None:
        """A matrix of which a rank has some outputs."""
        hidden = self._config.hidden
        if self._names.transposed:
            self.cuts[f"{name}.weight"] = Cut((hidden, outputs), columns=own)
        else:
            self.cuts[f"{name}.weight"] = Cut((outputs, hidden), own)
        self.cuts[f"{name}.bias"] = Cut((outputs,), own)

    def _inputs(self, name: str, inputs: int, own: Range) -> None:
        """A matrix of which a rank has some inputs: what comes out is summed over the ranks, its bias once."""
        hidden = self._config.hidden
        if self._names.transposed:
            self.cuts[f"{name}.weight"] = Cut((inputs, hidden), (own,))
        else:
            self.cuts[f"{name}.weight"] = Cut((hidden, inputs), columns=(own,))
        if self._rank:
            self.cuts[f"{name}.bias"] = Cut((hidden,), zero=True)


def _moved(of: Range, by: int) -> Range:
    return of[0] + by, of[1] + by
