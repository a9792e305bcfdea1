"""Some decoder layers of a T5: what a pipeline stage of an encoder-decoder computes. Knows no encoder and no message.

The encoder's states take the first slots of a sequence's blocks, the decoder's tokens those behind. So the keys and
values of cross-attention lie where those of self-attention do, and are counted, shared and given back with them; a
decoder token's position is its slot less the number of states.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import Loader
from .pool import BLOCK
from .span import Span
from .step import SHORT, Group, Row, Step, View, first_alone
from .t5 import T5Config
from .t5_parts import CROSS, CrossBlock, T5Loader, buckets_of

LONG = 4 * SHORT  # bytes, as SHORT: a row by itself has biases and a mask of its own here


@dataclass(slots=True)
class CrossRow(Row):
    """A row of a sequence whose first `cross` slots are those of the encoder's states.

    Where some of them are among its tokens, which then come first, x holds them; on the first span, where x is ids,
    they are `states` [some, hidden], and the ids in their places count for nothing.
    """

    cross: int = 0
    states: Tensor | None = None

    @property
    def remembered(self) -> int:
        """How many of its tokens are encoder states."""
        return min(self.count, max(0, self.cross - self.position))


@dataclass(slots=True)
class CrossStep(Step):
    """`slots` and `groups` are of the decoder's tokens alone.

    Attributes:
        said, held: which of the step's tokens are the decoder's, and which are states; None: all, and none.
        held_slots: where keys and values of states are written.
        states: those of the rows, joined, on the first span.
    """

    said: Tensor | None = None
    held: Tensor | None = None
    held_slots: Tensor | None = None
    states: Tensor | None = None


class T5Span(Span):
    """Decoder layers. Rows are CrossRows; what they hold of the encoder's states passes through unchanged."""

    crossed = True
    reads = T5Loader
    config: T5Config
    _blocks: Sequence[CrossBlock]
    _bias: Tensor  # [distances up to `farthest`, heads] of all layers' self-attention

    def _read_ends(self, loader: Loader) -> Iterator[None]:
        assert isinstance(loader, T5Loader)
        distances = torch.arange(self.config.farthest + 1)
        self._bias = loader.bias()[buckets_of(self.config, distances, both=False).to(self.device)]
        yield from super()._read_ends(loader)

    def _fix(self, tokens: int) -> None:
        if tokens:
            raise ValueError("deterministic is of decoder-only models, and this is an encoder-decoder; leave it out")

    def _plan(self, rows: Sequence[Row]) -> CrossStep:
        said: list[int] = []
        held: list[int] = []
        slots: list[int] = []
        held_slots: list[int] = []
        several: list[Group] = []
        singles: list[int] = []
        alone: list[CrossRow] = []
        states: list[Tensor] = []
        start = 0
        alone_from = first_alone(self._own, self.dtype, self.device, LONG)
        for row in rows:
            assert isinstance(row, CrossRow)
            first = row.remembered
            places = [row.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(row.position, row.position + row.count)]
            held += range(start, start + first)
            held_slots += places[:first]
            if row.states is not None:
                states.append(row.states)
            rest = CrossRow(row.position + first, row.count - first, row.blocks, row.cross)
            if rest.count == 1 and rest.position < alone_from:
                singles.append(len(said))
                alone.append(rest)
            elif rest.count:
                several.append(Group(1, slice(len(said), len(said) + rest.count), self._views([rest])))
            said += range(start + first, start + row.count)
            slots += places[first:]
            start += row.count
        if singles:
            tokens = torch.tensor(singles, device=self.device) if several else slice(None)
            several.insert(0, Group(len(singles), tokens, self._views(alone)))
        step = CrossStep(self._ids(said), self._ids(slots), several, [])
        if self.is_first and sum(map(len, states)) != len(held):
            raise ValueError(f"rows hold {len(held)} encoder states, {sum(map(len, states))} came")
        if held:
            step.said, step.held, step.held_slots = self._ids(said), self._ids(held), self._ids(held_slots)
            step.states = torch.cat(states).to(self.device, self.dtype) if states else None
        return step

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _views(self, rows: Sequence[CrossRow]) -> dict[int, View]:
        """What equally long rows see: decoder tokens up to themselves with their biases, and all states."""
        begins = [row.cross // BLOCK for row in rows]
        first = self._ids([row.position for row in rows]).view(-1, 1, 1)
        queries = first + torch.arange(rows[0].count, device=self.device).view(1, -1, 1)  # [rows, tokens, 1]
        cross = self._ids([row.cross for row in rows]).view(-1, 1, 1)
        table, keys = self._table(rows, begins, [(row.position + row.count - 1) // BLOCK + 1 for row in rows])
        mask = self._bias[(queries - keys).clamp(0, self.config.farthest)].permute(0, 3, 1, 2)
        mask = mask.masked_fill(((keys > queries) | (keys < cross))[:, None], float("-inf"))
        seen, keys = self._table(rows, [0] * len(rows), [-(-row.cross // BLOCK) for row in rows])
        hidden = (keys >= cross)[:, None]
        over = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        return {0: View(table, mask), CROSS: View(seen, over)}

    def _table(self, rows: Sequence[Row], begins: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Blocks `begins` to `ends` of each row, padded with block 0 to the widest, and which slots of the sequence
        they are, [rows, 1, slots]."""
        width = max(end - begin for begin, end in zip(begins, ends, strict=True))
        table = [
            row.blocks[begin:end] + [0] * (width - end + begin)
            for row, begin, end in zip(rows, begins, ends, strict=True)
        ]
        keys = self._ids(begins).view(-1, 1, 1) * BLOCK + torch.arange(width * BLOCK, device=self.device)
        return torch.tensor(table, device=self.device).view(-1), keys

    def _layers(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """What leaves the last layer, and what entered its MLP; of states themselves, and nothing."""
        assert isinstance(step, CrossStep)
        x = x.to(self.device)
        tokens = x if step.said is None else x[step.said]
        states: Tensor | None = None
        if self.embedding is not None:
            tokens, states = self.embedding(tokens), step.states
        else:
            tokens = tokens.to(self.dtype)
            states = x[step.held].to(self.dtype) if step.held is not None else None
        entered = tokens
        for layer, block in enumerate(self._blocks):
            if states is not None and step.held_slots is not None:
                block.cross.remember(states, step.held_slots, self._cache, layer)
            if len(tokens):
                tokens, entered = block(tokens, step, self._cache, layer)
            self.computed += 1
        if step.held is None or step.said is None or states is None:
            return tokens, entered
        hidden = torch.zeros(len(x), self.config.hidden, dtype=self.dtype, device=self.device)
        fed = torch.zeros_like(hidden)
        hidden[step.held] = states
        hidden[step.said], fed[step.said] = tokens, entered
        return hidden, fed

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.final_norm is not None and self.output is not None
        normed = self.final_norm(hidden)
        return self.output(normed if self.config.head_scale == 1.0 else normed * self.config.head_scale).float()
