"""Tensors as they travel: (dtype, shape, buffer). Ducks on numpy and torch objects; imports no torch."""

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
MAX_EXTENT = 1 << 48  # bytes an empty tensor would have with its zeros as ones: numpy and torch overflow beyond 2^63
_NAMES = {numpy_name: name for name, (numpy_name, _) in DTYPES.items() if name != "bf16"} | {"bfloat16": "bf16"}
_NATIVE = {np.dtype(numpy_name): name for name, (numpy_name, _) in DTYPES.items() if name != "bf16"}  # found sooner


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
        """The values as a read-only array of `shape`: a view, or a copy where the bytes lie misaligned.

        bf16 is widened to float32, which is exact.
        """
        flat = np.frombuffer(self.buffer, dtype=DTYPES[self.dtype][0])
        if not flat.flags.aligned:
            flat = flat.copy()
        if self.dtype == "bf16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        array = flat.reshape(self.shape)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.numpy(), dtype=dtype) if copy else np.asarray(self.numpy(), dtype=dtype)

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {list(self.shape)})"


def tensor_of(value: Any) -> Tensor:
    """A numpy array, torch tensor or Tensor as a Tensor; bytes are shared wherever the value is contiguous.

    Raises:
        Malformed: not an array, of a dtype that does not travel, or too large; found before anything is copied.
    """
    if isinstance(value, Tensor):
        return _checked(value)
    if isinstance(value, np.ndarray | np.generic):
        return _from_numpy(np.asarray(value))
    if hasattr(value, "data_ptr") and hasattr(value, "untyped_storage"):
        return _from_torch(value)
    raise Malformed(f"a {type(value).__name__} is no tensor: pass a numpy array or a torch tensor")


def _checked(tensor: Tensor) -> Tensor:
    """A Tensor that somebody else built, its buffer seen as bytes."""
    size = checked_size(tensor.dtype, tuple(tensor.shape))
    try:
        view = memoryview(tensor.buffer)
        buffer = view.cast("B") if view.nbytes else b""
    except TypeError as error:
        raise Malformed(f"the buffer of {tensor} cannot travel: {error}") from None
    if len(buffer) != size:
        raise Malformed(f"the buffer of {tensor} has {len(buffer)} bytes, its shape says {size}")
    return Tensor(tensor.dtype, tuple(tensor.shape), buffer)


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    name = _NATIVE.get(array.dtype) or _NAMES.get(array.dtype.name)
    if name is None:
        raise Malformed(f"dtype {array.dtype} does not travel: cast to one of {', '.join(DTYPES)}")
    shape = array.shape
    if not checked_size(name, shape):
        return Tensor(name, shape, b"")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    view = array.data if name != "bf16" else array.view(np.uint16).data  # its buffer has a format of its own
    return Tensor(name, shape, view.cast("B"))


def _from_torch(value: Any) -> Tensor:
    name = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if name is None:
        raise Malformed(f"dtype {value.dtype} does not travel: cast to one of {', '.join(DTYPES)}")
    if value.is_nested or value.is_meta or str(value.layout) != "torch.strided":
        raise Malformed("a nested, sparse or meta tensor does not travel: make it a dense one")
    shape = tuple(value.shape)
    size = checked_size(name, shape)
    if not size:
        return Tensor(name, shape, b"")
    value = value.detach().resolve_neg().cpu().contiguous()
    return Tensor(name, shape, np.asarray(_Memory(value, size)).data)


class _Memory:
    """The bytes of a contiguous torch tensor for numpy, which knows no bf16; the array made of it keeps it alive."""

    def __init__(self, owner: Any, size: int) -> None:
        self.owner = owner
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (size,), "data": (owner.data_ptr(), False)}


def checked_size(dtype: Any, shape: Any) -> int:
    """Bytes that a tensor of this descriptor holds.

    Raises:
        Malformed: unknown dtype, too many or negative dimensions, or more bytes than a message may have.
    """
    if type(dtype) is not str or dtype not in DTYPES:
        raise Malformed(f"a tensor has an unknown dtype: use one of {', '.join(DTYPES)}")
    if type(shape) not in (list, tuple) or len(shape) > MAX_DIMS:
        raise Malformed(f"a tensor must have at most {MAX_DIMS} dimensions: reshape it")
    size = extent = DTYPES[dtype][1]
    for count in shape:
        if type(count) is not int or not 0 <= count <= MAX_MESSAGE:
            raise Malformed(f"a tensor has a dimension that is not between 0 and {MAX_MESSAGE}")
        size *= count
        extent *= count or 1
    if size > MAX_MESSAGE or extent > MAX_EXTENT:
        raise Malformed(
            f"a tensor of shape {shape} is more than the {MAX_MESSAGE} bytes of a message: send it in parts"
        )
    return size
