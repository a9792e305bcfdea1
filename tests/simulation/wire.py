"""The codec as the peers of a simulation use it: the same bytes without checks, and one decoding of equal messages.

The broker's core always has the real codec. `Wire(strict=True)` gives the peers the real one, too: a run is the same.
"""

import struct
from functools import cache
from math import prod
from typing import Any

from msgpack import packb, unpackb
from ralmq.schema import codec
from ralmq.schema.frame import BODY_APART, LENGTHS, PREFIX, Prefix
from ralmq.schema.limits import ALIGNMENT, MAX_BODY_INLINE, MAX_TENSORS_INLINE, NO_ID, VERSION
from ralmq.schema.message import (
    CODES,
    KINDS,
    Cancel,
    Credit,
    Error,
    Final,
    Gone,
    Kind,
    Partial,
    Release,
    Request,
    Step,
    Welcome,
)
from ralmq.schema.tensor import DTYPES, Tensor, tensor_of

Frames = list[Any]
NO_ROUTING = 0x90  # an empty array
_ONE = struct.Struct("<HHB")
KIND_AT = 1  # the byte of the prefix that says which kind it is
CUT = (Error, Gone)  # text in them is cut by the real codec
SHARED = (Partial, Final, Step)  # nothing that these hold is changed after they were sent
PLAIN = (Request, Partial, Final, Error, Credit, Welcome, Cancel, Release)  # their fields are as msgpack has them


class Wire:
    """Encodes and decodes for the peers of one run."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self._known: dict[tuple[int, bytes], Any] = {}

    def encode(
        self,
        message: Any,
        *,
        id: bytes = NO_ID,
        attempt: int = 0,
        sequence: int = 0,
        epoch: int = 0,
        deadline: int = 0,
        flags: int = 0,
    ) -> Frames:
        """As schema's encode, which checks much more."""
        cls = type(message)
        if self.strict or cls in CUT:
            return codec.encode(
                message, id=id, attempt=attempt, sequence=sequence, epoch=epoch, deadline=deadline, flags=flags
            )
        if cls is Partial and not message.tensors:
            second = packb({"body": message.body})
            if len(second) <= MAX_BODY_INLINE:
                tail = _ONE.pack(1, len(second), NO_ROUTING) + second
                self._known[Kind.PARTIAL, tail] = message
                return [PREFIX.pack(VERSION, Kind.PARTIAL, flags, attempt, sequence, epoch, id, deadline) + tail]
        kind, routing, body, tensors = _plan(cls)
        inline: list[Any] = []
        values = {"body": message.body} if len(body) == 1 else {name: getattr(message, name) for name in body}
        if tensors and message.tensors:
            values["tensors"] = _inlined(message.tensors, inline)
        first = packb([getattr(message, name) for name in routing]) if routing else b"\x90"
        second = packb(values) if values else b""
        if len(second) > MAX_BODY_INLINE:
            prefix = PREFIX.pack(VERSION, kind, flags | BODY_APART, attempt, sequence & 0xFFFF, epoch, id, deadline)
            return [prefix + LENGTHS.pack(len(first), 0) + first, second]
        tail = LENGTHS.pack(len(first), len(second)) + first + second
        if inline:
            tail += bytes(-(PREFIX.size + len(tail)) % ALIGNMENT) + b"".join(inline)
        if cls in SHARED and all(type(tensor) is Tensor for tensor in message.tensors):
            self._known[kind, tail] = message
        return [PREFIX.pack(VERSION, kind, flags, attempt, sequence & 0xFFFF, epoch, id, deadline) + tail]

    def decode(self, frames: Frames) -> tuple[Prefix, Any]:
        """As schema's decode."""
        head = frames[0]
        if self.strict or len(frames) > 1:
            return codec.decode(frames)
        kind = head[KIND_AT]
        tail = head[PREFIX.size :]
        message = self._known.get((kind, tail))
        if message is None:
            cls = KINDS[kind]
            message = _plainly(cls, tail) if cls in PLAIN else codec.decode(frames)[1]
            if cls is not Request:  # its body is the receiver's own
                self._known[kind, tail] = message
        return tuple.__new__(Prefix, PREFIX.unpack_from(head)), message

    def forget(self) -> None:
        """The run is over."""
        self._known.clear()


@cache
def _plan(cls: Any) -> tuple[int, list[str], list[str], bool]:
    routing, body, tensors = codec.plan(cls)
    return CODES[cls], [name for name, _, _ in routing], [name for name, _, _ in body], tensors


def _plainly(cls: Any, tail: bytes) -> Any:
    """What stands behind the prefix, unchecked."""
    first, second = LENGTHS.unpack_from(tail)
    begin = LENGTHS.size
    _, routing, names, tensors = _plan(cls)
    values = dict(zip(routing, unpackb(tail[begin : begin + first]), strict=False))
    end = begin + first + second
    body = unpackb(tail[begin + first : end]) if second else {}
    for name in names:
        if name in body:
            values[name] = body[name]
    if tensors:
        end += -(PREFIX.size + end) % ALIGNMENT
        values["tensors"] = tuple([_tensor(tail, end + place, *kind) for *kind, place in body.get("tensors", ())])
    return cls(**values)


def _tensor(tail: bytes, begin: int, dtype: str, shape: list[int]) -> Tensor:
    return Tensor(dtype, tuple(shape), tail[begin : begin + prod(shape) * DTYPES[dtype][1]])


def _inlined(tensors: Any, inline: list[Any]) -> list[list[Any]]:
    """Descriptors of small tensors, whose padded bytes are put into `inline`."""
    descriptors: list[list[Any]] = []
    used = 0
    for tensor in map(tensor_of, tensors):
        padding = -tensor.nbytes % ALIGNMENT
        descriptors.append([tensor.dtype, list(tensor.shape), used])
        inline += [bytes(tensor.buffer), bytes(padding)]
        used += tensor.nbytes + padding
    assert used <= MAX_TENSORS_INLINE, "larger tensors are not sent here"
    return descriptors


def kind_of(frames: Frames) -> int:
    """The kind of a message that was encoded here or by a core."""
    return int(frames[0][KIND_AT])
