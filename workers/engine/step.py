"""One step's index tensors, made once for all layers of a span; knows which tokens see which slots, and no weight."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .device import upload
from .model import ModelConfig, Rope
from .pool import BLOCK

SHORT = 384 << 10  # bytes of a layer's keys and values that rows of one token read at most to attend together


@dataclass(slots=True)
class Row:
    """One sequence's share of a step: `count` tokens from absolute position `position` on.

    `blocks` is its block table: block ids for positions 0-15, 16-31, ... that covers position + count tokens.
    """

    position: int
    count: int
    blocks: list[int]


@dataclass(slots=True)
class View:
    """Which cached tokens the rows of a group may see."""

    table: torch.Tensor  # [batch * blocks], padded with block 0
    mask: torch.Tensor | None  # additive, [batch, 1, 1 or (tokens a row) * (heads a kv head), blocks * 16]
    seen: slice | None = None  # of each row's blocks * 16 slots; None: all of them


@dataclass(slots=True)
class Group:
    """Rows that attend in one call: short rows of one token, padded to the longest, or one row."""

    batch: int
    tokens: torch.Tensor | slice  # which tokens of the step, batch * (tokens a row) of them
    views: dict[int, View]  # by window: how many tokens a token sees, itself included; 0 for all


@dataclass(slots=True)
class Step:
    """n tokens: `positions` [n], `slots` [n or less] of the first ones, which alone are written, and a pair of cosines
    and sines [n, 1, dims] for each Rope."""

    positions: torch.Tensor
    slots: torch.Tensor
    groups: list[Group]
    ropes: list[tuple[torch.Tensor, torch.Tensor]]


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
    rows: Sequence[Row],
    config: ModelConfig,
    rope: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    width: int = 0,
) -> Step:
    """The step of `rows`. `rope` is the table of `rope_table`, None for learned positions; `width` > 0 lets rows of
    one token attend to so many blocks, most of them masked, whatever their positions are."""
    positions: list[int] = []
    slots: list[int] = []
    singles: list[int] = []
    single_rows: list[Row] = []
    groups: list[Group] = []
    windows = set(config.windows) or {0}
    bound = SHORT if len(rows) > 1 else 0  # a single row needs neither padding nor a mask
    alone_from = math.inf if width else first_alone(config, dtype, device, bound)
    for row in rows:
        start = len(positions)
        places = range(row.position, row.position + row.count)
        positions += places
        slots += [row.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in places]
        if row.count == 1 and row.position >= alone_from:
            groups.append(Group(1, slice(start, start + 1), _alone(row, windows, device)))
        elif row.count == 1:
            singles.append(start)
            single_rows.append(row)
        else:
            share = config.heads // config.kv_heads
            groups.append(Group(1, slice(start, start + row.count), _views([row], windows, share, dtype, device, 0)))
    if singles:
        tokens = slice(None) if not groups else upload(singles, device)
        groups.insert(0, Group(len(singles), tokens, _views(single_rows, windows, 1, dtype, device, width)))
    where = upload([positions, slots], device)
    step = Step(where[0], where[1], groups, [])
    if rope is not None:
        # [n, ropes, 2, dims] -> for each rope two of [n, 1, dims]
        step.ropes = [(pair[:, 0:1], pair[:, 1:2]) for pair in rope.index_select(0, where[0]).unbind(1)]
    return step


def calls(
    rows: Sequence[Row],
    size: int,
    config: ModelConfig,
    rope: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, int, Step]]:
    """The same tokens as steps of exactly `size`, each token a row that attends to as many blocks as the context has.

    So every product has one shape, and what comes out for a token does not depend, to the last bit, on what else was
    computed with it. Yields which of the tokens go in ([size], the first one again where too few are left), how many of
    them count, and the step, which writes keys and values of those alone.
    """
    tokens = [Row(row.position + place, 1, row.blocks) for row in rows for place in range(row.count)]
    width = -(-config.context // BLOCK)
    for start in range(0, len(tokens), size):
        count = min(size, len(tokens) - start)
        places = [*range(start, start + count), *[start] * (size - count)]
        step = plan([tokens[place] for place in places], config, rope, dtype, device, width)
        step.slots = step.slots[:count]
        yield upload(places, device), count, step


def first_alone(config: ModelConfig, dtype: torch.dtype, device: torch.device, most: int) -> float:
    """From which position on a row of one token attends by itself, in the host's memory: where it reads more than
    `most` bytes of a layer's keys and values. Rows that attend together are copied each as long as the longest of them,
    and of a large copy nothing is left in the processor's cache when it is read: 8 rows of 1000 tokens of GPT-2 took 4
    times as long.
    """
    if device.type != "cpu":
        return math.inf
    tokens = most / (2 * config.kv_heads * config.head_dim * dtype.itemsize)
    windows = config.windows or (0,)
    return math.inf if 0 not in windows and max(windows) <= tokens else tokens


def _alone(row: Row, windows: set[int], device: torch.device) -> dict[int, View]:
    """Views of a row of one token without padding, and so without a mask."""
    views: dict[int, View] = {}
    whole: dict[int, View] = {}  # by the first position that is seen
    for window in windows:
        begin = max(0, row.position + 1 - window) if window else 0
        if begin not in whole:
            first = begin // BLOCK
            table = upload(row.blocks[first : row.position // BLOCK + 1], device)
            whole[begin] = View(table, None, slice(begin - first * BLOCK, row.position + 1 - first * BLOCK))
        views[window] = whole[begin]
    return views


def _views(
    rows: Sequence[Row], windows: set[int], share: int, dtype: torch.dtype, device: torch.device, width: int
) -> dict[int, View]:
    """A view of equally long rows for each window; a window that hides nothing from any of them has the whole view."""
    longest = max(row.position + row.count for row in rows)
    narrow = {window for window in windows if 0 < window < longest}
    views = {window: _view(rows, window, share, dtype, device, width) for window in narrow}
    if narrow != windows:
        views.update(dict.fromkeys(windows - narrow, _view(rows, 0, share, dtype, device, width)))
    return views


def _view(rows: Sequence[Row], window: int, share: int, dtype: torch.dtype, device: torch.device, width: int) -> View:
    """Causal over what is cached and what is new, reading only the blocks that a window touches, or `width` of them.

    Heads that share a kv head lie one after the other as queries, hence `share`.
    """
    begins = [max(0, row.position + 1 - window) // BLOCK if window and not width else 0 for row in rows]
    ends = [(row.position + row.count - 1) // BLOCK + 1 for row in rows]
    width = width or max(end - begin for begin, end in zip(begins, ends, strict=True))
    table = [
        row.blocks[begin:end] + [0] * (width - end + begin) for row, begin, end in zip(rows, begins, ends, strict=True)
    ]
    first = upload([row.position for row in rows], device).view(-1, 1, 1, 1)
    last = first + torch.arange(rows[0].count, device=device).repeat(share).view(1, 1, -1, 1)
    keys = upload(begins, device).view(-1, 1, 1, 1) * BLOCK + torch.arange(width * BLOCK, device=device)
    hidden = keys > last
    if window:
        hidden |= keys <= last - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return View(upload(table, device).view(-1), mask)


def rope_table(config: ModelConfig, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rotary factors [positions, ropes, 2, dims]: cosines, and sines with the sign of the half they multiply.

    RoPE, Su et al. 2021, in the half-split form of Llama.
    """
    tables = []
    for rope in config.ropes:
        angle = torch.arange(positions, dtype=torch.float32)[:, None] * _frequencies(rope)
        cos, sin = angle.cos() * rope.amplitude, angle.sin() * rope.amplitude
        tables.append(torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1))
    return torch.stack(tables, 1).to(dtype=dtype, device=device)


def _frequencies(rope: Rope) -> torch.Tensor:
    """[dims / 2], in radians per token."""
    frequency = 1.0 / rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "longrope":
        return frequency / torch.tensor(rope.factors)
    if rope.kind == "default":
        return frequency
    if rope.kind == "llama3":
        turns = rope.original_context * frequency / (2 * math.pi)
        keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0.0, 1.0)
    else:
        # yarn: at which dimension a frequency makes so many turns in the original context
        edges = [
            rope.dims * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.high, rope.low)
        ]
        if rope.truncate:
            edges = [math.floor(edges[0]), math.ceil(edges[1])]
        begin, end = max(edges[0], 0), min(edges[1], rope.dims - 1)
        keep = 1 - ((torch.arange(rope.dims // 2) - begin) / max(end - begin, 0.001)).clamp(0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / rope.factor
