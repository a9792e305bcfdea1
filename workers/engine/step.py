"""One step's index tensors, made once for all layers of a span; knows which tokens see which slots, and no weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import ModelConfig
from .pool import BLOCK


@dataclass(slots=True)
class Row:
    """One sequence's share of a step: `count` tokens from absolute position `position` on.

    `blocks` is its block table: block ids for positions 0-15, 16-31, ... that covers position + count tokens.
    """

    position: int
    count: int
    blocks: list[int]


@dataclass(slots=True)
class Group:
    """Rows that attend in one call: all rows of one token, padded to the longest, or one row of several tokens."""

    batch: int
    tokens: torch.Tensor | slice  # which tokens of the step, batch * (tokens a row) of them
    table: torch.Tensor  # [batch * blocks], padded with block 0
    mask: torch.Tensor  # additive, [batch, 1, 1 or (tokens a row) * (heads a kv head), blocks * 16]


@dataclass(slots=True)
class Step:
    """n tokens: `positions` [n], `slots` [n], and with rotary positions `cos` and `sin` [n, 1, head_dim]."""

    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[Group]
    cos: torch.Tensor | None
    sin: torch.Tensor | None


def check_rows(rows: Sequence[Row], tokens: int, context: int, blocks: int) -> None:
    """ValueError for rows that do not fit the `tokens` given, the context, their block tables or the cache."""
    total = 0
    for row in rows:
        end = row.position + row.count
        total += row.count
        if row.position < 0 or row.count < 1 or end > context:
            raise ValueError(
                f"row of {row.count} tokens at position {row.position} is outside the context of {context}"
            )
        if end > len(row.blocks) * BLOCK:
            raise ValueError(f"row needs {end} tokens but its {len(row.blocks)} blocks hold {len(row.blocks) * BLOCK}")
        if min(row.blocks) < 0 or max(row.blocks) >= blocks:
            raise ValueError(f"row names a block that is not one of the {blocks} blocks of the cache")
    if total != tokens or not rows:
        raise ValueError(f"rows list {total} tokens where {tokens} are given")


def plan(
    rows: Sequence[Row], config: ModelConfig, rope: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> Step:
    """The step of `rows`. `rope` is the table of `rope_table`, None for learned positions."""
    positions: list[int] = []
    slots: list[int] = []
    singles: list[int] = []
    single_rows: list[Row] = []
    groups: list[Group] = []
    for row in rows:
        start = len(positions)
        places = range(row.position, row.position + row.count)
        positions += places
        slots += [row.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in places]
        if row.count == 1:
            singles.append(start)
            single_rows.append(row)
        else:
            groups.append(_several(row, start, config.heads // config.kv_heads, dtype, device))
    if singles:
        tokens = slice(None) if not groups else torch.tensor(singles, device=device)
        groups.insert(0, _one_each(single_rows, tokens, dtype, device))
    where = torch.tensor([positions, slots], device=device)
    step = Step(where[0], where[1], groups, None, None)
    if rope is not None:
        step.cos, step.sin = rope.index_select(0, where[0]).unsqueeze(2).unbind(1)
    return step


def _one_each(rows: Sequence[Row], tokens: torch.Tensor | slice, dtype: torch.dtype, device: torch.device) -> Group:
    width = max(row.position for row in rows) // BLOCK + 1
    table = [row.blocks[:width] + [0] * (width - len(row.blocks)) for row in rows]
    last = torch.tensor([row.position for row in rows], device=device).view(-1, 1, 1, 1)
    mask = _mask(last, width * BLOCK, dtype)
    return Group(len(rows), tokens, torch.tensor(table, device=device).view(-1), mask)


def _several(row: Row, start: int, share: int, dtype: torch.dtype, device: torch.device) -> Group:
    """Causal over what is cached and what is new. Heads that share a kv head lie one after the other, hence `share`."""
    end = row.position + row.count
    width = (end - 1) // BLOCK + 1
    last = torch.arange(row.position, end, device=device).repeat(share).view(1, 1, -1, 1)
    mask = _mask(last, width * BLOCK, dtype)
    return Group(1, slice(start, start + row.count), torch.tensor(row.blocks[:width], device=device), mask)


def _mask(last: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    hidden = torch.arange(keys, device=last.device) > last
    return torch.zeros(hidden.shape, dtype=dtype, device=last.device).masked_fill_(hidden, float("-inf"))


def rope_table(config: ModelConfig, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rotary factors [positions, 2, head_dim]: cosines, and sines with the sign of the half they multiply.

    RoPE, Su et al. 2021, in the half-split form of Llama; "llama3" scaling as in Llama 3.1.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**half
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:
        turns = scaling.original_context * frequency / (2 * torch.pi)
        keep = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    table = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1)
    return table.to(dtype=dtype, device=device)
