"""x [n, in] -> [n, out] with a weight matrix of 8-bit integers. Knows matrices alone, as linear.py does."""

import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 127  # of int8, each way
PIECE = 64  # rows that are quantized at a time
TILE = 1 << 20  # elements that are dequantized at a time
TINY = torch.finfo(torch.float32).tiny

Product = Callable[[Tensor], Tensor]
_engine = threading.Lock()  # torch has one for all threads


class Int8:
    """Weights as int8 with one scale per output (symmetric), a quarter of the bytes of fp32.

    With kernels for it each row of x is rounded to 8 bits too, with a scale of its own (as in Dettmers et al. 2022,
    LLM.int8()): the sums are exact integers, so a row's result does not depend on the rows beside it. Elsewhere, and
    with `packed` off, x stays as it is and the weight is dequantized a tile at a time.
    """

    __slots__ = ("_codes", "_product", "_scale", "bias", "nbytes", "packed")

    def __init__(self, outputs: int, inputs: int, device: torch.device, packed: bool) -> None:
        self._codes = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
        self._scale = torch.empty(outputs, device=device)
        self._product: Product | None = None
        self.nbytes = self._codes.nbytes + self._scale.nbytes
        self.bias: Tensor | None = None
        self.packed = packed and device.type == "cpu"

    def fill(self, start: int, rows: Tensor, column: int = 0) -> None:
        assert (column, rows.shape[1]) == (0, self._codes.shape[1]), "a scale is of a row"
        for first in range(0, len(rows), PIECE):
            piece = rows[first : first + PIECE].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            scale = piece.abs().amax(1).div_(LEVELS).clamp_min_(TINY)
            place = slice(start + first, start + first + len(piece))
            self._codes[place] = piece.div_(scale[:, None]).round_().clamp_(-LEVELS, LEVELS)
            self._scale[place] = scale

    def finished(self) -> "Int8":
        if self.packed and self._product is None:
            kernel = _fbgemm if fbgemm_quantizes() else _onednn if onednn_quantizes() else None
            if kernel is not None:
                self._product = kernel(self._taken(), self._scale)
        return self

    def _taken(self) -> Tensor:
        """The codes, held by the caller alone: packing copies them, once or twice."""
        codes, self._codes = self._codes, self._codes.new_empty(0, self._codes.shape[1])
        return codes

    def __call__(self, x: Tensor) -> Tensor:
        if self._product is None or not len(x):
            return self._tiled(x)
        largest = x.abs().amax(1, keepdim=True).clamp_min_(TINY)  # vector_norm is not vectorized
        out = self._product(x / largest)
        return out.mul_(largest) if self.bias is None else torch.addcmul(self.bias, out, largest)

    def _tiled(self, x: Tensor) -> Tensor:
        outputs = len(self._scale)
        out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
        tile = max(1, TILE // x.shape[1])
        for start in range(0, outputs if len(x) else 0, tile):
            part = slice(start, start + tile)
            weight = (self._codes[part] * self._scale[part, None]).to(x.dtype)
            out[:, part] = functional.linear(x, weight)
        return out if self.bias is None else out.add_(self.bias)


# Both kernels take x [n, in] from -1 to 1 and round x * 127 to integers; theirs are unsigned, with 128 as zero.


def _fbgemm(codes: Tensor, scale: Tensor) -> Product:
    """PyTorch's own, 1.4 times as fast as oneDNN's at one row and alike from 32 on. It may go with torch.qint8, of
    which torch warns that it will (pytorch issue 184982); what it gives is the same."""
    zeros = torch.zeros(len(codes), dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    del codes
    with _engine:
        before = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = "fbgemm"
            packed = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before
    multiply: Any = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, 1 / LEVELS, 128, packed)
        return out

    return product


def _onednn(codes: Tensor, scale: Tensor) -> Product:
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(codes), dtype=torch.int32)
    half = torch.tensor(128.5)  # what follows it is cut off
    rest: Any = (1 / LEVELS, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.onednn.qlinear_pointwise(torch.add(half, x, alpha=LEVELS).to(torch.uint8), *rest)
        return out

    return product


@cache
def fbgemm_quantizes() -> bool:
    """Whether this torch has FBGEMM's product, and this processor sums it without saturating."""
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # it is known, see above
    return exact(_fbgemm)


@cache
def onednn_quantizes() -> bool:
    """The same of oneDNN's."""
    return exact(_onednn)


def exact(kernel: Callable[[Tensor, Tensor], Product]) -> bool:
    """Whether a kernel is there and gives sums of integers, the largest among them."""
    codes = (torch.arange(64 * 128, dtype=torch.int32) * 37 % 255 - 127).view(64, 128)
    codes[0] = LEVELS
    x = (torch.arange(3 * 128, dtype=torch.int32) * 29 % 255 - 127).view(3, 128)
    x[0] = LEVELS
    expected = (x @ codes.t()).float()
    try:
        product = kernel(codes.to(torch.int8), torch.ones(64))
        found = [product(x[:rows] / LEVELS) * LEVELS for rows in (1, 3)]
    except (AttributeError, RuntimeError):
        return False
    return all(torch.allclose(got, expected[: len(got)], rtol=1e-5, atol=0.5) for got in found)
