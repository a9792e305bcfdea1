"""Messages to frames and back. `decode` is total: a message, or Malformed; never another exception."""

from collections.abc import Hashable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

import msgpack

from .checks import Check, Field
from .errors import Malformed
from .frame import BODY_APART, LENGTHS, PREFIX, Prefix, read_prefix, sections
from .limits import (
    ALIGNMENT,
    HEAD,
    MAX_BODY,
    MAX_BODY_INLINE,
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_ROUTING,
    MAX_TENSORS,
    MAX_TENSORS_INLINE,
    NO_ID,
    VERSION,
)
from .message import CODES, KINDS
from .tensor import Tensor, checked_size, tensor_of

TENSORS = "tensors"
_Plan = tuple[list[tuple[str, Check, bool]], list[tuple[str, Check, bool]], bool]


@cache
def plan(cls: Hashable) -> _Plan:
    """Routing fields, body fields (name, check, required) of a message class, and whether it carries tensors."""
    hints = get_type_hints(cls, include_extras=True)
    routing: list[tuple[str, Check, bool]] = []
    body: list[tuple[str, Check, bool]] = []
    for entry in fields(cls):
        required = entry.default is MISSING and entry.default_factory is MISSING
        for note in getattr(hints[entry.name], "__metadata__", ()):
            if isinstance(note, Field):
                (routing if note.section == "routing" else body).append((entry.name, note.check, required))
    return routing, body, TENSORS in hints


def encode(
    message: Any,
    *,
    id: bytes = NO_ID,
    attempt: int = 0,
    sequence: int = 0,
    epoch: int = 0,
    deadline: int = 0,
    flags: int = 0,
) -> list[Any]:
    """Frames of a message: bytes for frame 0, then raw buffers that share memory with the tensors.

    Args:
        message: one of the classes in KINDS; its tensors may be numpy arrays, torch tensors or Tensors.
        deadline: ms left, 0 for none.

    Raises:
        Malformed: a field, the body or the tensors are more than a message may hold, or of a type that cannot travel.
    """
    cls = type(message)
    routing_fields, body_fields, _ = plan(cls)
    routing = _packed([getattr(message, name) for name, _, _ in routing_fields], "routing", MAX_ROUTING)
    values = {name: getattr(message, name) for name, _, _ in body_fields}
    inline, frames, descriptors = _lay_out(getattr(message, TENSORS, ()))
    if descriptors:
        values[TENSORS] = descriptors
    body = _packed(values, "body", MAX_BODY) if values else b""
    if len(body) > MAX_BODY_INLINE:
        flags |= BODY_APART
        frames.insert(0, body)
        body = b""
    prefix = PREFIX.pack(VERSION, CODES[cls], flags, attempt, sequence & 0xFFFF, epoch, id, deadline)
    head = prefix + LENGTHS.pack(len(routing), len(body)) + routing + body
    if inline:
        head += bytes(-len(head) % ALIGNMENT) + b"".join(inline)
    if len(frames) + 1 > MAX_FRAMES:
        raise Malformed(f"{len(frames) + 1} frames, a message has at most {MAX_FRAMES}: join tensors or send fewer")
    size = len(head) + sum(len(frame) for frame in frames)
    if size > MAX_MESSAGE:
        raise Malformed(f"{size} bytes, a message has at most {MAX_MESSAGE}: send it in parts")
    return [head, *frames]


def decode(frames: Sequence[Any]) -> tuple[Prefix, Any]:
    """Prefix and message of received frames (bytes-like); tensors are views into the frames.

    Raises:
        Malformed: whatever is wrong with them.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise Malformed(f"{len(frames)} frames, expected 1 to {MAX_FRAMES}")
    prefix = read_prefix(frames[0])
    cls = KINDS.get(prefix.kind)
    if cls is None:
        raise Malformed(f"unknown message kind {prefix.kind}: the other side may be newer")
    routing_end, body_end = sections(frames[0])
    head = memoryview(frames[0])
    routing_fields, body_fields, has_tensors = plan(cls)
    values = _routing_values(unpacked(head[HEAD:routing_end]), routing_fields)
    rest = list(frames[1:])
    body: Any = {}
    if prefix.flags & BODY_APART:
        if not rest or len(rest[0]) > MAX_BODY:
            raise Malformed(f"the body's own frame is missing or longer than {MAX_BODY} bytes")
        body = unpacked(rest.pop(0))
    elif body_end > routing_end:
        body = unpacked(head[routing_end:body_end])
    if type(body) is not dict:
        raise Malformed("the body is no map")
    for name, check, required in body_fields:
        if name in body:
            values[name] = _checked(name, check, body[name])
        elif required:
            raise Malformed(f"{cls.__name__} lacks {name}")
    tensors = _tensors(body.get(TENSORS, []), head[body_end + (-body_end % ALIGNMENT) :], rest)
    if has_tensors:
        values[TENSORS] = tensors
    elif tensors:
        raise Malformed(f"{cls.__name__} carries no tensors")
    return prefix, cls(**values)


def routing_of(head: Any) -> list[Any]:
    """The routing array of frame 0, not checked further: what the broker reads on its hot path.

    Raises:
        Malformed: not an array.
    """
    end, _ = sections(head)
    values = unpacked(memoryview(head)[HEAD:end])
    if type(values) is not list:
        raise Malformed("the routing section is no array")
    return values


def unpacked(data: Any) -> Any:
    """One msgpack value under this protocol's limits.

    Raises:
        Malformed: not exactly one value, too long, or of an extension type.
    """
    try:
        return msgpack.unpackb(
            data,
            max_str_len=MAX_BODY,
            max_bin_len=MAX_BODY,
            max_array_len=65_536,
            max_map_len=4_096,
            max_ext_len=0,
            ext_hook=_no_extension,
        )
    except Malformed:
        raise
    except Exception as error:  # msgpack raises a dozen types for bad bytes; each means the same here
        raise Malformed(f"a section is not msgpack within the limits ({type(error).__name__})") from None


def _no_extension(code: int, data: bytes) -> Any:
    raise Malformed(f"msgpack extension type {code} is not used here")


def _packed(value: Any, section: str, most: int) -> bytes:
    try:
        data: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Malformed(f"the {section} cannot travel: {error}") from None
    if len(data) > most:
        raise Malformed(f"the {section} has {len(data)} bytes, at most {most} may travel: send tensors instead")
    return data


def _lay_out(tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[list[Any]]]:
    """Inline pieces (padded), frames, and descriptors [dtype, shape, inline offset or -frame number]."""
    inline: list[Any] = []
    frames: list[Any] = []
    descriptors: list[list[Any]] = []
    used = 0
    for tensor in map(tensor_of, tensors):
        size = tensor.nbytes
        if used + size <= MAX_TENSORS_INLINE:
            descriptors.append([tensor.dtype, list(tensor.shape), used])
            padding = -size % ALIGNMENT
            inline += [tensor.buffer, bytes(padding)]
            used += size + padding
        else:
            frames.append(tensor.buffer)
            descriptors.append([tensor.dtype, list(tensor.shape), -len(frames)])
    if len(descriptors) > MAX_TENSORS:
        raise Malformed(f"{len(descriptors)} tensors, a message has at most {MAX_TENSORS}")
    return inline, frames, descriptors


def _tensors(descriptors: Any, inline: memoryview, frames: list[Any]) -> tuple[Tensor, ...]:
    if type(descriptors) is not list or len(descriptors) > MAX_TENSORS:
        raise Malformed(f"the tensor descriptors are no list of at most {MAX_TENSORS}")
    found: list[Tensor] = []
    for entry in descriptors:
        if type(entry) is not list or len(entry) != 3 or type(entry[2]) is not int:
            raise Malformed("a tensor descriptor is not [dtype, shape, place]")
        dtype, shape, place = entry
        size = checked_size(dtype, shape)
        if place < 0:
            if -place > len(frames) or len(frames[-place - 1]) != size:
                raise Malformed("a tensor's frame is missing or of another size than its shape says")
            buffer = memoryview(frames[-place - 1])
        else:
            if place % ALIGNMENT or place + size > len(inline):
                raise Malformed("an inline tensor does not lie within frame 0")
            buffer = inline[place : place + size]
        found.append(Tensor(dtype, tuple(shape), buffer))
    return tuple(found)


def _routing_values(routing: Any, expected: list[tuple[str, Check, bool]]) -> dict[str, Any]:
    """Fields by name; entries beyond those known come from a later version and are passed over."""
    if type(routing) is not list:
        raise Malformed("the routing section is no array")
    for name, _, required in expected[len(routing) :]:
        if required:
            raise Malformed(f"the routing section lacks {name}")
    return {name: _checked(name, check, value) for (name, check, _), value in zip(expected, routing, strict=False)}


def _checked(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except Malformed as error:
        raise Malformed(f"{name}: {error.message}") from None
