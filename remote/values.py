"""Arguments and results as they travel: plain values, with tensors and handles in their places. Knows no peer.

A list on the wire begins with a tag, so that nothing in it is taken for something else: `l` list, `t` tuple, `m` map,
`x` tensor (its index among the message's tensors, whether it requires grad), `h` handle, `s` slice, `e` ellipsis,
`d` dtype, `v` device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ..schema.errors import Malformed
from ..schema.tensor import Tensor, tensor_of
from ..workers.tensors import to_torch

PLAIN: Final = (bool, int, float, str, bytes)
DTYPES: Final = {
    str(found).removeprefix("torch."): found for found in vars(torch).values() if isinstance(found, torch.dtype)
}
Packed = Any


class Ref(NamedTuple):
    """A value that lies on a worker.

    `service` is "" for the worker that reads this, else the owner's; `session` and `near` are its session with the
    caller, and its door where both are on one host ("" where they are not).
    """

    number: int
    service: str = ""
    session: bytes = b""
    near: str = ""


def pack(
    value: Any, tensors: list[Any], other: Callable[[Any], Ref | None] = lambda value: None, *, copy: int = 0
) -> Packed:
    """A value as msgpack holds it; tensors in it are appended to `tensors`.

    Args:
        other: gives the handle that an object stands for, or None.
        copy: tensors of fewer bytes may change before they are sent.

    Raises:
        TypeError: something that does not travel.
        Malformed: a tensor that does not travel.
    """
    if value is None or type(value) in PLAIN:
        return value
    ref = other(value)
    if ref is not None:
        return ["h", *ref]
    if isinstance(value, torch.Tensor | np.ndarray):
        grad = isinstance(value, torch.Tensor) and value.requires_grad
        if value.nbytes < copy:
            value = value.detach().clone() if isinstance(value, torch.Tensor) else value.copy()
        tensors.append(tensor_of(value))
        return ["x", len(tensors) - 1, grad]
    if isinstance(value, list):
        return ["l", *[pack(entry, tensors, other, copy=copy) for entry in value]]
    if isinstance(value, tuple):
        return ["t", *[pack(entry, tensors, other, copy=copy) for entry in value]]
    if isinstance(value, dict):
        return ["m", *[pack(part, tensors, other, copy=copy) for pair in value.items() for part in pair]]
    if isinstance(value, slice):
        return ["s", *[pack(part, tensors, other, copy=copy) for part in (value.start, value.stop, value.step)]]
    if value is ...:
        return ["e"]
    if isinstance(value, torch.dtype):
        return ["d", str(value).removeprefix("torch.")]
    if isinstance(value, torch.device):
        return ["v", str(value)]
    if isinstance(value, bool | int | float | np.generic):
        return value.item() if isinstance(value, np.generic) else value
    raise TypeError(
        f"a {type(value).__name__} does not travel: pass numbers, text, lists, maps, tensors or remote tensors"
    )


def unpack(packed: Packed, tensor: Callable[[int, bool], Any], handle: Callable[[Ref], Any]) -> Any:
    """What was packed.

    Args:
        tensor: gives the tensor of an index, and whether it required grad.
        handle: gives the value that a handle stands for.

    Raises:
        Malformed: nothing that `pack` makes.
    """
    if packed is None or type(packed) in PLAIN:
        return packed
    if type(packed) is not list or not packed or type(packed[0]) is not str:
        raise Malformed("an argument is no packed value")
    tag, *rest = packed
    if tag == "x" and len(rest) == 2 and type(rest[0]) is int:
        return tensor(rest[0], bool(rest[1]))
    if tag == "h":
        return handle(_ref(rest))
    if tag == "d" and len(rest) == 1 and type(rest[0]) is str and rest[0] in DTYPES:
        return DTYPES[rest[0]]
    if tag == "v" and len(rest) == 1 and type(rest[0]) is str:
        return torch.device(rest[0])
    if tag == "e":
        return ...
    found = [unpack(entry, tensor, handle) for entry in rest]
    if tag == "l":
        return found
    if tag == "t":
        return tuple(found)
    if tag == "s" and len(found) == 3:
        return slice(*found)
    if tag == "m" and len(found) % 2 == 0:
        return dict(zip(found[::2], found[1::2], strict=True))
    raise Malformed(f"an argument has the unknown tag {tag!r:.40}")


def refs_in(packed: Packed) -> Iterator[Ref]:
    """The handles in a packed value, in the order in which `unpack` meets them."""
    if type(packed) is list and packed:
        if packed[0] == "h":
            yield _ref(packed[1:])
        else:
            for entry in packed[1:]:
                yield from refs_in(entry)


def _ref(fields: list[Any]) -> Ref:
    if len(fields) != 4 or [type(field) for field in fields] != [int, str, bytes, str]:
        raise Malformed("a handle is none")
    return Ref(*fields)


def received(tensors: Sequence[Tensor], index: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor of a message as one of its own memory: the message's may be another process's, and read-only."""
    if not 0 <= index < len(tensors):
        raise Malformed("an argument names a tensor that is not there")
    found = to_torch(tensors[index])
    return found.clone() if torch.device(device).type == "cpu" else found.to(device)


def opened(body: dict[str, Any], tensors: Sequence[Tensor], *, grad: bool = False) -> Any:
    """The value of an answer that has nothing but values and tensors in it; with `grad` they require it as before."""

    def none(ref: Ref) -> Any:
        raise Malformed("an answer holds a handle")

    def tensor(index: int, requires: bool) -> torch.Tensor:
        return received(tensors, index).requires_grad_(grad and requires)

    return unpack(body.get("a"), tensor, none)


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [leaf for entry in value for leaf in leaves(entry)]
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    return []


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same result with each tensor changed; named tuples and classes of maps become plain ones."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list):
        return [mapped(entry, change) for entry in value]
    if isinstance(value, tuple):
        return tuple(mapped(entry, change) for entry in value)
    if isinstance(value, dict):
        return {name: mapped(entry, change) for name, entry in value.items()}
    return value
