"""Arrays of numpy and tensors of torch as flat elements, and what is computed of several. Knows no rank, no message."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...schema.errors import Malformed, Refused
from ...schema.tensor import DTYPES, Tensor, tensor_of

Array = np.ndarray[Any, Any]
WIDE: Final = {"bf16": np.dtype(np.float32), "f16": np.dtype(np.float32)}  # what these are computed in
MEAN: Final = "mean"
_STEPS: Final[dict[str, Callable[..., Any]]] = {
    "sum": np.add,
    MEAN: np.add,
    "prod": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
}
OPS: Final = tuple(_STEPS)
NAMES: Final = {name: code for code, (name, _) in DTYPES.items() if code != "bf16"} | {"bfloat16": "bf16"}


@dataclass(slots=True)
class Elements:
    """What an array holds.

    Attributes:
        dtype: one of DTYPES.
        flat: [n], of the dtype that numpy has for it: bf16 as uint16.
        torch: whether whoever gave it gave a torch tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    flat: Array
    torch: bool = False

    @property
    def nbytes(self) -> int:
        return int(self.flat.nbytes)

    def cut(self, begin: int, end: int) -> "Elements":
        """Some of them, flat; no copy."""
        return Elements(self.dtype, (end - begin,), self.flat[begin:end], self.torch)

    def tensor(self) -> Tensor:
        """As it travels; no copy."""
        return Tensor(self.dtype, self.shape, self.flat.data.cast("B") if self.flat.size else b"")


def is_torch(value: Any) -> bool:
    return hasattr(value, "data_ptr") and hasattr(value, "untyped_storage")


def described(value: Any) -> list[Any]:
    """Dtype, as numpy and torch call it, and shape of an array or tensor, wherever it lies.

    Raises:
        Malformed: it is neither, or does not travel.
    """
    torch = is_torch(value)
    if torch or isinstance(value, np.ndarray | np.generic):
        name = str(value.dtype).removeprefix("torch.") if torch else value.dtype.name
        if name in NAMES and not (torch and (value.is_nested or value.is_meta or value.is_sparse)):
            return [name, list(value.shape)]
    tensor_of(value)
    raise Malformed(f"a {type(value).__name__} of this kind does not travel: pass a dense array or tensor")


def elements_of(value: Any) -> Elements:
    """The elements of what `described` takes, or of a Tensor that came; shared wherever they lie together."""
    if isinstance(value, Tensor):
        dtype = DTYPES[value.dtype][0]
        flat = np.frombuffer(value.buffer, dtype) if len(value.buffer) else np.empty(0, dtype)
        return Elements(value.dtype, value.shape, flat if flat.flags.aligned else flat.copy())
    name, shape = described(value)
    if is_torch(value):
        import torch

        tensor = value.detach().resolve_neg().cpu().contiguous().reshape(-1)
        flat = (tensor.view(torch.int16) if name == "bfloat16" else tensor).numpy()
    else:
        array = np.asarray(value)
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(-1)
    return Elements(NAMES[name], tuple(shape), flat.view(DTYPES[NAMES[name]][0]), is_torch(value))


def as_given(found: Elements, given: Any) -> Any:
    """A new array or tensor of the kind of `given`, a tensor on its device; of the sender's kind where it is None."""
    flat = found.flat if found.flat.flags.owndata and found.flat.flags.writeable else found.flat.copy()
    if is_torch(given) or (given is None and found.torch):
        import torch

        values = torch.from_numpy(flat)
        if found.dtype == "bf16":
            values = values.view(torch.bfloat16)
        return values.reshape(found.shape).to(given.device if given is not None else "cpu")
    if found.dtype == "bf16":
        own = getattr(given, "dtype", None)  # numpy has none of its own
        flat = flat.view(own) if own is not None and own.name == "bfloat16" else widened(flat, "bf16")
    return flat.reshape(found.shape)


def check_op(op: str, dtype: str) -> None:
    """Raises Refused for an operation that there is not, or not of truth values."""
    if op not in _STEPS:
        raise Refused(f"{op!r} is no operation: use one of {', '.join(OPS)}")
    if dtype == "bool" and op not in ("max", "min"):
        raise Refused(f"{op} of bool: use max for any, min for all, or convert to integers")


def result_dtype(op: str, dtype: str) -> str:
    """The mean of integers is float64, as in numpy; else the dtype stays."""
    return "f64" if op == MEAN and dtype[0] in "iu" else dtype


class Reduction:
    """What is computed of several arrays, one after the other: the same bits for the same order.

    bf16 and f16 are computed in float32 and rounded once, at the end; everything else in its own dtype.
    """

    def __init__(self, op: str, dtype: str) -> None:
        self._op, self._dtype = op, dtype
        self._step = _STEPS[op]
        self._made: Array | None = None
        self._count = 0

    def add(self, flat: Array) -> None:
        """The next one, which is not kept."""
        self._count += 1
        values = widened(flat, self._dtype)
        if result_dtype(self._op, self._dtype) != self._dtype:
            values = values.astype(np.float64)
        if self._made is None:
            self._made = values.copy() if values is flat else values
        else:
            self._step(self._made, values, out=self._made)

    def result(self) -> Array:
        """Of all that were added, flat."""
        assert self._made is not None
        if self._op == MEAN:
            self._made /= self._made.dtype.type(self._count)
        return narrowed(self._made, self._dtype)


def reduced(op: str, dtype: str, flats: Iterable[Array]) -> Array:
    """Of several flat arrays, in their order."""
    reduction = Reduction(op, dtype)
    for flat in flats:
        reduction.add(flat)
    return reduction.result()


def widened(flat: Array, dtype: str) -> Array:
    """In the dtype that it is computed in; itself where that is its own."""
    if dtype == "bf16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(WIDE[dtype]) if dtype in WIDE else flat


def narrowed(values: Array, dtype: str) -> Array:
    """Back from there; bf16 is rounded to the nearest, ties to even."""
    if dtype == "bf16":
        bits = values.view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values.astype(np.float16) if dtype == "f16" else values
