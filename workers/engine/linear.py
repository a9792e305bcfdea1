"""x [n, in] -> [n, out] with one weight matrix, in the form that is fastest for its dtype and machine.

Knows matrices alone: no layer, no file. Each form is filled by rows while a checkpoint is read, so that a matrix is
never held twice; only layouts of kernels' own are made from a finished one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .int8 import Int8

WIDTH = 64  # outputs of one block of Blocked
GROUP = 16  # rows of one small product of Blocked
SMALL = 1_000_000  # up to so many multiplications OpenBLAS runs its unpacked kernels (sgemm_small_kernel_permit)
WORTH = 1 << 17  # elements of a matrix from which another form than the plain one pays


class Linear(Protocol):
    """One matrix product. `bias` [out] or None is set before the first call."""

    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without the bias."""
        ...

    def fill(self, start: int, rows: Tensor, column: int = 0) -> None:
        """Sets outputs `start` ... and inputs `column` ... of the weight to `rows` [some, some], of any float dtype."""
        ...

    def finished(self) -> "Linear":
        """What to call once every row is filled: this, or another form made from it."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] -> a new tensor [n, out]."""
        ...


@dataclass(slots=True)
class Plain:
    """torch's own product; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None = None
    packed: bool = False  # whether `finished` may pack it for oneDNN

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def fill(self, start: int, rows: Tensor, column: int = 0) -> None:
        self.weight[start : start + len(rows), column : column + rows.shape[1]] = rows

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [n] of the weight, [n, in]: what an embedding tied to this matrix looks up."""
        return functional.embedding(ids, self.weight)

    def finished(self) -> "Linear":
        if self.packed and self.weight.numel() >= WORTH and onednn_packs():
            return Packed(torch.ops.mkldnn._reorder_linear_weight(self.weight, GROUP), self.weight.nbytes, self.bias)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class Packed:
    """oneDNN's own layout for fp32; 1.1x of the plain form at one row and 1.7x to 2x at 4 to 16, any threads."""

    weight: Tensor  # opaque
    nbytes: int
    bias: Tensor | None = None

    def fill(self, start: int, rows: Tensor, column: int = 0) -> None:
        raise TypeError("a packed matrix is made from a plain one")

    def finished(self) -> "Linear":
        return self

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


class Blocked:
    """fp32, one thread: blocks [in / parts, 64] that OpenBLAS, which numpy brings, multiplies without packing them.

    At a few rows a product is bound by reading the weight, and MKL and oneDNN read it at half the memory's bandwidth;
    OpenBLAS' kernels for small matrices reach it. Rows go 16 at a time, and a block stays in the second-level cache
    for all of them. One row goes as two: a product with one row is another, slower routine, which starts threads.
    """

    __slots__ = ("_blocks", "_numpy", "bias", "outputs")

    def __init__(self, outputs: int, inputs: int) -> None:
        parts = parts_of(inputs)
        assert parts is not None
        # numpy asks the kernel for huge pages, torch does not.
        self._numpy = np.empty((parts, -(-outputs // WIDTH), 1, inputs // parts, WIDTH), np.float32)
        self._blocks = torch.from_numpy(self._numpy)
        self._blocks[:, -1].zero_()  # what is behind the last output
        self.outputs = outputs
        self.bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes

    def fill(self, start: int, rows: Tensor, column: int = 0) -> None:
        parts, _, _, depth, _ = self._blocks.shape
        end = column + rows.shape[1]
        for part in range(parts):
            low, high = max(column, part * depth), min(end, (part + 1) * depth)
            if low < high:
                place = self._blocks[part, :, 0, low - part * depth : high - part * depth]
                self._place(place, start, rows[:, low - column : high - column])

    def _place(self, blocks: Tensor, start: int, rows: Tensor) -> None:
        """Puts `rows` [some outputs, some inputs] into `blocks` [blocks, some inputs, 64], whole blocks at once."""
        done = 0
        while done < len(rows):
            block, column = divmod(start + done, WIDTH)
            left = len(rows) - done
            if column == 0 and left >= WIDTH:
                whole = left // WIDTH
                count = whole * WIDTH
                blocks[block : block + whole] = rows[done : done + count].unflatten(0, (whole, WIDTH)).transpose(1, 2)
            else:
                count = min(WIDTH - column, left)
                blocks[block, :, column : column + count] = rows[done : done + count].t()
            done += count

    def finished(self) -> "Linear":
        return self

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` [n] of the weight, [n, in], as Plain.rows."""
        picked = self._blocks[:, ids // WIDTH, 0, :, ids % WIDTH]
        return picked.reshape(len(ids), -1)

    def __call__(self, x: Tensor) -> Tensor:
        n = len(x)
        if n == 1:
            return self._one(x)
        parts, blocks, _, depth, _ = self._blocks.shape
        groups = max(1, -(-n // GROUP))
        rows = max(2, n) if groups < 2 else GROUP
        if n != groups * rows:
            x = functional.pad(x, (0, 0, 0, groups * rows - n))
        x = x.reshape(groups, rows, parts, depth).permute(2, 0, 1, 3).unsqueeze(1)
        made = torch.from_numpy(np.matmul(x.numpy(), self._numpy))  # [parts, blocks, groups, rows, 64]
        total = made[0] if parts == 1 else made.sum(0)
        out = total.permute(1, 2, 0, 3).reshape(groups * rows, blocks * WIDTH)[:n, : self.outputs]
        return out.contiguous() if self.bias is None else out + self.bias

    def _one(self, x: Tensor) -> Tensor:
        """The same for one row: what is around the product counts here, and numpy does less of it than torch."""
        parts, _, _, depth, _ = self._numpy.shape
        twice = np.empty((parts, 1, 1, 2, depth), np.float32)
        twice[:] = x.numpy().reshape(parts, 1, 1, 1, depth)
        made = np.matmul(twice, self._numpy)[:, :, 0, 0]  # [parts, blocks, 64]
        with np.errstate(invalid="ignore"):  # as torch does: what is no number shows in what follows
            out = (made[0] if parts == 1 else made.sum(0)).reshape(1, -1)[:, : self.outputs]
        return torch.from_numpy(np.ascontiguousarray(out) if self.bias is None else out + self.bias.numpy())


def empty(
    outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, *, int8: bool = False, packed: bool = False
) -> Linear:
    """A matrix to be filled, in the form that fits. With `packed` forms count that suit this machine alone; which one
    depends on sizes, torch's threads and the processor, never on a timing: a replay must give the same bits."""
    if int8:
        return Int8(outputs, inputs, device, packed)
    packed = packed and device.type == "cpu" and dtype == torch.float32
    if packed and outputs * inputs >= WORTH and parts_of(inputs) and torch.get_num_threads() == 1 and blas_blocks():
        return Blocked(outputs, inputs)
    return Plain(torch.empty(outputs, inputs, dtype=dtype, device=device), packed=packed)


def parts_of(inputs: int) -> int | None:
    """Into how many equal parts `inputs` are cut so that 16 rows of one block are a small product; None: into none."""
    fewest = -(-inputs * GROUP * WIDTH // SMALL)
    return next((n for n in range(fewest, 4 * fewest + 1) if inputs % n == 0), None)


@cache
def blas_blocks() -> bool:
    """Whether numpy's BLAS has kernels for small matrices: OpenBLAS on a processor with AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    built: Any = np.show_config(mode="dicts")  # type: ignore[call-overload,unused-ignore]
    return "openblas" in str(built["Build Dependencies"]["blas"]["name"])


@cache
def onednn_packs() -> bool:
    """Whether this torch packs a matrix for oneDNN and multiplies right with it."""
    weight, x = _sample(64, 96), _sample(3, 96)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, GROUP)
        got = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(torch.allclose(got, functional.linear(x, weight), atol=1e-5))


def _sample(rows: int, columns: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, rows * columns).view(rows, columns)
