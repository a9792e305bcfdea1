"""Messages to frames and back. `decode` is total: a message, or Malformed; never another exception."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, get_type_hints

import msgpack

from .checks import Check, Field, identifier
from .errors import Malformed
from .frame import BODY_APART, LENGTHS, PREFIX, Prefix, read_prefix, sections
from .limits import (
    ALIGNMENT,
    HEAD,
    MAX_BODY,
    MAX_BODY_INLINE,
    MAX_CONTAINERS,
    MAX_ENTRIES,
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
NOTHING = msgpack.packb([])  # the routing section of kinds that have none
_Plan = tuple[list[tuple[str, Check, bool]], list[tuple[str, Check, bool]], bool]


@cache
def plan(cls: Any) -> _Plan:
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
        message: one of the classes in KINDS; its tensors may be numpy arrays, torch tensors or Tensors. They must not
            change before the frames are sent.
        sequence: wraps at 2^16.
        deadline: ms left, 0 for none.

    Raises:
        Malformed: a field, the body or the tensors are more than a message may hold, or of a type that cannot travel.
    """
    cls: Any = type(message)
    if cls not in CODES:
        raise Malformed(f"a {cls.__name__} is no message: use one of {', '.join(kind.__name__ for kind in CODES)}")
    routing_fields, body_fields, _ = plan(cls)
    try:
        routed = [check(getattr(message, name)) for name, check, _ in routing_fields]
        values = {name: check(getattr(message, name)) for name, check, _ in body_fields}
    except Malformed as error:
        broken = (name for name, check, _ in (*routing_fields, *body_fields) if _refuses(check, getattr(message, name)))
        raise Malformed(f"{next(broken)}: {error.message}") from None
    routing = _packed(routed, "routing", MAX_ROUTING) if routed else NOTHING
    inline, frames, descriptors = _lay_out(getattr(message, TENSORS, ()))
    if descriptors:
        values[TENSORS] = descriptors
    body = _packed(values, "body", MAX_BODY) if values else b""
    flags &= ~BODY_APART
    if len(body) > MAX_BODY_INLINE:
        flags |= BODY_APART
        frames.insert(0, body)
        body = b""
    _checked("id", identifier, id)
    try:
        prefix = PREFIX.pack(VERSION, CODES[cls], flags, attempt, sequence & 0xFFFF, epoch, id, deadline)
    except struct.error as error:
        raise Malformed(f"a field of the prefix is out of range: {error}") from None
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
    """Prefix and message of received frames (bytes, memoryviews, zmq Frames); tensors are views into the frames.

    Raises:
        Malformed: whatever is wrong with them.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise Malformed(f"{len(frames)} frames, expected 1 to {MAX_FRAMES}")
    head, *rest = _views(frames)
    prefix = read_prefix(head)
    cls: Any = KINDS.get(prefix.kind)
    if cls is None:
        raise Malformed(f"unknown message kind {prefix.kind}: the other side may be newer")
    routing_end, body_end = sections(head)
    routing_fields, body_fields, has_tensors = plan(cls)
    routing = head[HEAD:routing_end]
    values = {} if routing == NOTHING and not routing_fields else _routing_values(unpacked(routing), routing_fields)
    body: Any = {}
    if prefix.flags & BODY_APART:
        if not rest or len(rest[0]) > MAX_BODY or body_end > routing_end:
            raise Malformed(f"the body's own frame is missing, longer than {MAX_BODY} bytes, or not the only body")
        body = unpacked(rest.pop(0))
    elif body_end > routing_end:
        body = unpacked(head[routing_end:body_end])
    if type(body) is not dict:
        raise Malformed("the body is no map")
    for name, check, required in body_fields:
        if name in body:
            try:
                values[name] = check(body[name])
            except Malformed as error:
                raise Malformed(f"{name}: {error.message}") from None
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
        Malformed: not exactly one value, too large, with keys that are no text, or of an extension type.
    """
    raw = bytes(data)
    size = len(raw)
    count = _counter() if size > MAX_BODY_INLINE else None
    try:
        # An array costs 8 bytes an entry as soon as it is claimed, and claims nest a thousand deep. Where there may be
        # more than a few long arrays, a walk that builds nothing comes first: it fails unless every entry is there.
        if raw.count(b"\xdc") + raw.count(b"\xdd") > 8:
            walk = msgpack.Unpacker(max_buffer_size=size)
            walk.feed(raw)
            walk.skip()
        return msgpack.unpackb(
            raw,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=min(size, MAX_ENTRIES),
            max_map_len=min(size, MAX_ENTRIES),
            max_ext_len=0,
            ext_hook=_no_extension,
            list_hook=count,
            object_hook=count,
        )
    except Malformed:
        raise
    except Exception as error:  # msgpack raises a dozen types for bad bytes; each means the same here
        raise Malformed(f"not msgpack within the limits: {str(error)[:80] or type(error).__name__}") from None


def _counter() -> Callable[[Any], Any]:
    left = MAX_CONTAINERS

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Malformed(f"more than {MAX_CONTAINERS} lists and maps: send tensors instead")
        return container

    return count


def _no_extension(code: int, data: bytes) -> Any:
    raise Malformed(f"msgpack extension type {code} is not used here")


def _packed(value: Any, section: str, most: int) -> bytes:
    """A section's bytes, which the other side will take."""
    try:
        data: bytes = msgpack.packb(value, default=_not_packed)
    except Malformed:
        raise
    except Exception as error:  # msgpack and the buffers in a body raise a dozen types
        raise Malformed(f"the {section} cannot travel: {error}") from None
    if len(data) > most:
        advice = "send tensors instead" if section == "body" else "use shorter and fewer names"
        raise Malformed(f"the {section} has {len(data)} bytes, at most {most} may travel: {advice}")
    try:
        unpacked(data)
    except Malformed as error:
        raise Malformed(f"the {section} cannot travel: {error.message}") from None
    return data


def _not_packed(value: Any) -> Any:
    if isinstance(value, int):
        raise Malformed("a whole number in a body must lie between -2^63 and 2^64 - 1: send it as text")
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if hasattr(value, "dtype"):
        raise Malformed(f"a {name} cannot travel in a body: convert a number with .item(), pass an array as a tensor")
    raise Malformed(f"a {name} cannot travel in a body: use text, numbers, bytes, lists and maps")


def _lay_out(tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[list[Any]]]:
    """Inline pieces (padded), frames, and descriptors [dtype, shape, inline offset or -frame number]."""
    inline: list[Any] = []
    frames: list[Any] = []
    descriptors: list[list[Any]] = []
    used = total = 0
    if not isinstance(tensors, list | tuple):
        raise Malformed(f"tensors must be a list, got one {type(tensors).__name__}: put it into [ ]")
    if len(tensors) > MAX_TENSORS:
        raise Malformed(f"{len(tensors)} tensors, a message has at most {MAX_TENSORS}: join them")
    for tensor in map(tensor_of, tensors):
        size = tensor.nbytes
        total += size
        if total > MAX_MESSAGE:  # before more of them are made contiguous, which may copy
            raise Malformed(f"tensors of more than {MAX_MESSAGE} bytes in one message: send them in parts")
        if used + size <= MAX_TENSORS_INLINE:
            descriptors.append([tensor.dtype, list(tensor.shape), used])
            padding = -size % ALIGNMENT
            inline += [tensor.buffer, bytes(padding)]
            used += size + padding
        else:
            frames.append(tensor.buffer)
            descriptors.append([tensor.dtype, list(tensor.shape), -len(frames)])
    return inline, frames, descriptors


def _views(frames: Sequence[Any]) -> list[memoryview]:
    """The frames as flat bytes."""
    try:
        views = [memoryview(frame) for frame in frames]
        views = [view.cast("B") if view.nbytes else memoryview(b"") for view in views]
    except TypeError as error:
        raise Malformed(f"a frame is no plain buffer: {error}") from None
    size = sum([len(view) for view in views])
    if size > MAX_MESSAGE:
        raise Malformed(f"{size} bytes, a message has at most {MAX_MESSAGE}")
    return views


def _tensors(descriptors: Any, inline: memoryview, frames: list[memoryview]) -> tuple[Tensor, ...]:
    """Views of the buffers; each byte belongs to one tensor, so that a small message stays small when copied."""
    if type(descriptors) is not list or len(descriptors) > MAX_TENSORS:
        raise Malformed(f"the tensor descriptors are no list of at most {MAX_TENSORS}")
    found: list[Tensor] = []
    used = taken = 0
    for entry in descriptors:
        if type(entry) is not list or len(entry) != 3 or type(entry[2]) is not int:
            raise Malformed("a tensor descriptor is not [dtype, shape, place]")
        dtype, shape, place = entry
        size = checked_size(dtype, shape)
        if place < 0:
            if -place != taken + 1 or taken == len(frames) or len(frames[taken]) != size:
                raise Malformed("a tensor's frame is missing, not the next one, or of another size than its shape says")
            buffer = frames[taken]
            taken += 1
        else:
            if place < used or place % ALIGNMENT or place + size > len(inline):
                raise Malformed("an inline tensor does not lie within frame 0 behind the one before it")
            buffer = inline[place : place + size]
            used = place + size
        found.append(Tensor(dtype, tuple(shape), buffer))
    if taken < len(frames):
        raise Malformed(f"{len(frames) - taken} frames belong to no tensor")
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


def _refuses(check: Check, value: Any) -> bool:
    try:
        check(value)
    except Malformed:
        return True
    return False
