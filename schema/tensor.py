"""Tensors as they travel: (dtype, shape, buffer). Ducks on numpy and torch objects; imports no torch."""

import ctypes
import math
from typing import Any

import numpy as np

from .errors import Malformed
from .limits import MAX_DIMS, MAX_MESSAGE

# name on the wire -> (numpy name, bytes an element); numpy has no bfloat16, so its bits are read as uint16
DTYPES: dict[str, tuple[str, int]] = {
    "f64": ("float64", 8),
    "f32": ("float32", 4),
    "f16": ("float16", 2),
    "bf16": ("uint16", 2),
    "i64": ("int64", 8),
    "i32": ("int32", 4),
    "i16": ("int16", 2),
    "i8": ("int8", 1),
    "u64": ("uint64", 8),
    "u32": ("uint32", 4),
    "u16": ("uint16", 2),
    "u8": ("uint8", 1),
    "bool": ("bool", 1),
}
_NAMES = {numpy_name: name for name, (numpy_name, _) in DTYPES.items() if name != "bf16"} | {"bfloat16": "bf16"}


class Tensor:
    """A typed view of bytes.

    Attributes:
        dtype: one of DTYPES.
        shape: sizes, () for a scalar.
        buffer: C-contiguous bytes-like object of product(shape) x itemsize bytes; not copied.
    """

    __slots__ = ("buffer", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], buffer: Any) -> None:
        self.dtype = dtype
        self.shape = shape
        self.buffer = buffer

    @property
    def nbytes(self) -> int:
        return len(self.buffer)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as an array of `shape`: a read-only view, or a copy where the bytes lie misaligned.

        bf16 is widened to float32, which is exact.
        """
        flat = np.frombuffer(self.buffer, dtype=DTYPES[self.dtype][0])
        if not flat.flags.aligned:
            flat = flat.copy()
        if self.dtype == "bf16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {list(self.shape)})"


def tensor_of(value: Any) -> Tensor:
    """A numpy array, torch tensor or Tensor as a Tensor; bytes are shared wherever the value is contiguous.

    Raises:
        Malformed: not an array, or of a dtype that does not travel.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _from_numpy(np.asarray(value))
    if hasattr(value, "data_ptr") and hasattr(value, "untyped_storage"):
        return _from_torch(value)
    raise Malformed(f"a {type(value).__name__} is no tensor: pass a numpy array or a torch tensor")


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    name = _NAMES.get(array.dtype.name)
    if name is None:
        raise Malformed(f"dtype {array.dtype} does not travel: cast to one of {', '.join(DTYPES)}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    shape = array.shape  # taken first: ascontiguousarray makes a scalar one-dimensional
    flat = np.ascontiguousarray(array).reshape(-1)
    return Tensor(name, shape, flat.view(np.uint8).data if flat.size else b"")


def _from_torch(value: Any) -> Tensor:
    name = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if name is None or str(value.layout) != "torch.strided":
        raise Malformed(f"a {value.layout} tensor of {value.dtype} does not travel: cast to one of {', '.join(DTYPES)}")
    value = value.detach().resolve_neg().cpu().contiguous()
    shape = tuple(value.shape)
    size = value.numel() * value.element_size()
    if not size:
        return Tensor(name, shape, b"")
    # read the storage directly: numpy knows no bf16, and the array keeps the tensor alive
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    memory.owner = value
    return Tensor(name, shape, memoryview(memory).cast("B"))


def checked_size(dtype: Any, shape: Any) -> int:
    """Bytes that a tensor of this descriptor holds.

    Raises:
        Malformed: unknown dtype, too many or negative dimensions, or more bytes than a message may have.
    """
    if type(dtype) is not str or dtype not in DTYPES:
        raise Malformed("a tensor has an unknown dtype")
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise Malformed(f"a tensor must have at most {MAX_DIMS} dimensions")
    if not all(type(size) is int and 0 <= size <= MAX_MESSAGE for size in shape):
        raise Malformed("a tensor has a dimension out of range")
    size = math.prod(shape) * DTYPES[dtype][1]
    if size > MAX_MESSAGE:
        raise Malformed(f"a tensor has {size} bytes, more than the {MAX_MESSAGE} of a message")
    return size
