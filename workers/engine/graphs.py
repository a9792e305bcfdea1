"""Steps of one token a row in a few fixed shapes, recorded once and then replayed: CUDA graphs where there are any.

Elsewhere the same shapes run as they are. Knows what enters a step, not what its layers do.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .device import upload
from .kv import KVCache
from .model import ModelConfig
from .pool import BLOCK
from .step import Group, Row, Step, View

log = logging.getLogger("ralmq.engine")
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # rows of a recorded step; fewer are padded
NARROWEST = 4  # blocks that the rows of a step attend to at least; then 8, 16 ... up to the context

Pair = tuple[Tensor, Tensor]
Layers = Callable[[Tensor, Step], Pair]


class Recorder(Protocol):
    """Makes of a function of fixed tensors one that does the same with what is in them then."""

    def __call__(self, run: Callable[[], Pair]) -> Callable[[], Pair]: ...


def eagerly(run: Callable[[], Pair]) -> Callable[[], Pair]:
    """For devices that record nothing."""
    return run


class CudaGraphs:
    """Records into CUDA graphs that share their memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Pair]) -> Callable[[], Pair]:
        with torch.cuda.device(self._device):
            return self._recorded(run)

    def _recorded(self, run: Callable[[], Pair]) -> Callable[[], Pair]:
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            run()  # libraries allocate at their first call, which cannot be recorded
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may do with the device what they like meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Pair:
            with torch.cuda.device(self._device):
                graph.replay()
            return made

        return replay


class Shape:
    """The tensors of one shape, which stay where they are, and the step that is made of them.

    `ints`: positions, slots and block tables of all rows, so that they come in one copy.
    """

    def __init__(self, rows: int, width: int, x: Tensor) -> None:
        """`x`: as it enters a step, for its shape and dtype."""
        self.rows = rows
        self.width = width
        self.ints = torch.zeros(rows * (2 + width), dtype=torch.int64, device=x.device)
        self.x = torch.zeros(rows, *x.shape[1:], dtype=x.dtype, device=x.device)
        self._keys = torch.arange(width * BLOCK, device=x.device)
        self.replay: Callable[[], Pair] | None = None

    def step(self, config: ModelConfig, rope: Tensor | None, dtype: torch.dtype) -> Step:
        """As `plan` makes it, but all of it on the device."""
        positions, slots, table = self.ints.split((self.rows, self.rows, self.rows * self.width))
        last = positions.view(-1, 1, 1, 1)
        views: dict[int, View] = {}
        for window in set(config.windows) or {0}:
            hidden = self._keys > last
            if window:
                hidden = hidden | (self._keys <= last - window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
            views[window] = View(table, mask)
        step = Step(positions, slots, [Group(self.rows, slice(None), views)], [])
        if rope is not None:
            step.ropes = [(pair[:, 0:1], pair[:, 1:2]) for pair in rope.index_select(0, positions).unbind(1)]
        return step


class Decoder:
    """Runs steps whose rows have one token each.

    Attributes:
        shapes: (rows, blocks) of what was recorded so far.
    """

    def __init__(
        self, config: ModelConfig, rope: Tensor | None, cache: KVCache, dtype: torch.dtype, record: Recorder
    ) -> None:
        """`config` is of what this rank holds; the cache has one block more than is given out, for padding."""
        self._config = config
        self._rope = rope
        self._cache = cache
        self._dtype = dtype
        self._record = record
        self._broken = False
        self._shapes: dict[tuple[int, int], Shape] = {}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return sorted(self._shapes)

    def run(self, rows: Sequence[Row], x: Tensor, layers: Layers) -> Pair | None:
        """What leaves the last layer and what entered its MLP, both [n, hidden]; None for a step of other rows.

        `x` is on the device. What is returned stays: it is no part of a recorded step's memory.
        """
        n = len(rows)
        if self._broken or n > BATCHES[-1] or any(row.count > 1 for row in rows):
            return None
        shape = self._shape(rows, x)
        shape.x[:n].copy_(x, non_blocking=True)
        shape.ints.copy_(upload(self._ints(rows, shape), x.device), non_blocking=True)
        if shape.replay is None:
            try:
                shape.replay = self._record(lambda: layers(shape.x, shape.step(self._config, self._rope, self._dtype)))
            except RuntimeError as error:
                log.warning("steps are not recorded on %s: %s", x.device, str(error).splitlines()[0])
                self._broken = True
                return None
        hidden, entered = shape.replay()
        return hidden[:n].clone(), entered[:n].clone()

    def _shape(self, rows: Sequence[Row], x: Tensor) -> Shape:
        batch = next(size for size in BATCHES if size >= len(rows))
        needed = max(row.position for row in rows) // BLOCK + 1
        width, most = NARROWEST, -(-self._config.context // BLOCK)
        while width < needed:
            width *= 2
        width = max(needed, min(width, most))
        if (batch, width) not in self._shapes:
            # Not in the dtype in which they came first: other neighbours may send more of each value.
            self._shapes[batch, width] = Shape(batch, width, x.to(self._dtype) if x.is_floating_point() else x)
        return self._shapes[batch, width]

    def _ints(self, rows: Sequence[Row], shape: Shape) -> list[int]:
        """Rows that pad the step write into the spare block, and see one slot of it."""
        missing, spare = shape.rows - len(rows), self._cache.blocks
        positions = [row.position for row in rows] + [0] * missing
        slots = [row.blocks[row.position // BLOCK] * BLOCK + row.position % BLOCK for row in rows]
        slots += [spare * BLOCK] * missing
        ints = positions + slots
        for row in rows:
            used = row.blocks[: row.position // BLOCK + 1]
            ints += used + [0] * (shape.width - len(used))
        return ints + [spare] * (missing * shape.width)
