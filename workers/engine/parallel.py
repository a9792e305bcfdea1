"""Ranks that compute one span together: what they sum, gather and tell each other. Knows no layer and no process."""

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .blocks import Map
from .errors import RankLost
from .shard import part
from .step import Row

INTERFACE = "GLOO_SOCKET_IFNAME"  # environment: where ranks talk to each other; the loopback interface if not set
FOR_EVER = timedelta(days=365)  # a rank waits for the next step as long as its stage lives
CLOSING = 1.0  # seconds that a step has to notice that its connections are gone
PACKET = 16 << 10  # bytes that are broadcast in any case: the whole of most steps
DTYPES = (torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.float16)
HEADER = 8  # int64 in front: order, bytes behind, integers behind, dtype, dimensions, two sizes, where the tensor is


class Order(IntEnum):
    """What rank 0 has the others do."""

    STEP = 1
    HEAD = 2
    END = 3


@dataclass(slots=True)
class Told:
    """An order; the integers are the rows of a step."""

    order: Order
    rows: list[Row]
    x: Tensor | None


def loopback() -> str:
    """The name of the interface that no other machine reaches."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


class Group:
    """One rank's end of the connections between ranks.

    Orders go over gloo, in the host's memory; sums over NCCL where the ranks are on GPUs of CUDA.

    Attributes:
        counts: collectives so far, by name: all_reduce, gather and broadcast (of orders).
    """

    def __init__(self, rank: int, size: int, store: Any, device: torch.device, timeout: timedelta = FOR_EVER) -> None:
        """Returns once all ranks are connected. RankLost where they are not in time."""
        self.rank = rank
        self.size = size
        self.device = device
        self.counts: Counter[str] = Counter()
        self._idle = threading.Lock()
        self._closed = False
        os.environ.setdefault(INTERFACE, loopback())
        apart: Any = dist  # its stubs do not export stores
        gloo, nccl = apart.PrefixStore("gloo", store), apart.PrefixStore("nccl", store)
        self._control = self._try(lambda: dist.ProcessGroupGloo(gloo, rank, size, timeout))
        self._data = self._control
        if device.type == "cuda" and dist.is_nccl_available():
            torch.cuda.set_device(device)
            self._data = self._try(lambda: dist.ProcessGroupNCCL(nccl, rank, size, dist.ProcessGroupNCCL.Options()))
        # NCCL connects at the first call, by the store.
        self._try(lambda: self._data.allreduce([torch.zeros(1, device=device)]).wait())

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            with self._idle:
                if self._closed:
                    raise RuntimeError("closed")
                return call()
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank} of {self.size} has lost one of the others, or cannot reach it") from error

    def close(self) -> None:
        """Ends this rank's connections, also while another thread computes; nothing can be computed afterwards."""
        self._closed = True
        for group in {id(group): group for group in (self._control, self._data)}.values():
            group.abort()
        # Who lets go of a group last waits, in torch, until all that was asked of it is done.
        if self._idle.acquire(timeout=CLOSING):
            self._control = self._data = None
            self._idle.release()

    def reduce(self, x: Tensor) -> Tensor:
        """x becomes its sum over the ranks, the same bits on each."""
        self.counts["all_reduce"] += 1
        self._try(lambda: self._data.allreduce([x]).wait())
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of each rank, of one shape, at rank 0; nothing elsewhere."""
        self.counts["gather"] += 1
        options = dist.GatherOptions()
        options.rootRank = 0
        made = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._try(lambda: self._data.gather([made] if made else [], [x], options).wait())
        return made

    def tell(self, order: Order, rows: Sequence[Row] = (), x: Tensor | None = None) -> None:
        """Rank 0's order to the others: one broadcast, two where it is long or x is on a GPU."""
        ints = [n for row in rows for n in (row.position, row.count, len(row.blocks), *row.blocks)]
        away = x is not None and x.device.type != "cpu"
        inside = b"" if x is None or away else x.contiguous().view(torch.uint8).numpy().tobytes()
        shape = [] if x is None else [x.dim(), *x.shape, 0][:3]
        length = 8 * (HEADER + len(ints)) + len(inside)
        dtype = 0 if x is None else DTYPES.index(x.dtype)
        head = [int(order), length, len(ints), dtype, *shape, *[0] * (3 - len(shape)), int(away)]
        message = torch.zeros(max(length, PACKET), dtype=torch.uint8)
        message[: 8 * (HEADER + len(ints))] = torch.tensor([*head, *ints]).view(torch.uint8)
        if inside:
            message[length - len(inside) : length] = torch.frombuffer(bytearray(inside), dtype=torch.uint8)
        self._broadcast(self._control, message[:PACKET])
        if length > PACKET:
            self._broadcast(self._control, message[PACKET:length])
        if away:
            assert x is not None
            self._broadcast(self._data, x.contiguous())

    def hear(self) -> Told:
        """The next order of rank 0, waited for as long as it takes."""
        message = torch.empty(PACKET, dtype=torch.uint8)
        self._broadcast(self._control, message)
        order, length, ints, dtype, dims, n, d, away = message[: 8 * HEADER].view(torch.int64).tolist()
        if length > PACKET:
            rest = torch.empty(length - PACKET, dtype=torch.uint8)
            self._broadcast(self._control, rest)
            message = torch.cat((message, rest))
        begin = 8 * (HEADER + ints)
        rows = _rows(message[8 * HEADER : begin].view(torch.int64).tolist())
        if not dims:
            return Told(Order(order), rows, None)
        shape = (n, d)[:dims]
        if away:
            x = torch.empty(shape, dtype=DTYPES[dtype], device=self.device)
            self._broadcast(self._data, x)
        else:
            x = message[begin:length].view(DTYPES[dtype]).view(shape)
        return Told(Order(order), rows, x)

    def _broadcast(self, group: Any, x: Tensor) -> None:
        self.counts["broadcast"] += 1
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._try(lambda: group.broadcast([x], options).wait())


def _rows(ints: list[int]) -> list[Row]:
    rows: list[Row] = []
    at = 0
    while at < len(ints):
        position, count, blocks = ints[at : at + 3]
        rows.append(Row(position, count, ints[at + 3 : at + 3 + blocks]))
        at += 3 + blocks
    return rows


@dataclass(slots=True)
class Summed:
    """A part of the layer that gives each rank a summand of what leaves it."""

    inner: Map
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.reduce(self.inner(x))


@dataclass(slots=True)
class Looked:
    """An embedding of which each rank has the rows of some tokens: ids [n] -> rows [n, hidden]."""

    inner: Map
    group: Group
    vocab: int

    def __call__(self, ids: Tensor) -> Tensor:
        begin, end = part(self.vocab, self.group.rank, self.group.size)
        own = (ids >= begin) & (ids < end)
        rows = self.inner((ids - begin).clamp(0, end - begin - 1))
        return self.group.reduce(rows.masked_fill(~own[:, None], 0.0))


@dataclass(slots=True)
class Gathered:
    """A head of which each rank has the logits of some tokens: [n, hidden] -> [n, vocab] at rank 0, elsewhere none."""

    inner: Map
    group: Group
    vocab: int

    def __call__(self, x: Tensor) -> Tensor:
        sizes = [end - begin for begin, end in (part(self.vocab, rank, self.group.size) for rank in self._ranks)]
        own = self.inner(x)
        most = max(sizes)
        made = self.group.gather(own if own.shape[1] == most else functional.pad(own, (0, most - own.shape[1])))
        if not made:
            return own.new_empty(0, self.vocab)
        return torch.cat([logits[:, :size] for logits, size in zip(made, sizes, strict=True)], 1)

    @property
    def _ranks(self) -> range:
        return range(self.group.size)
