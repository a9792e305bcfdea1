"""Frame 0: prefix, section lengths, and what the broker may touch of them. Knows no message class."""

import struct
from typing import Any, NamedTuple

from .errors import Malformed
from .limits import (
    ALIGNMENT,
    HEAD,
    MAX_BODY_INLINE,
    MAX_FRAME_0,
    MAX_ROUTING,
    MAX_TENSORS_INLINE,
    NO_ID,
    VERSION,
)

PREFIX = struct.Struct("<BBBxHHI16sI")
ATTEMPT = struct.Struct("<H")  # at byte 4 of the prefix
EPOCH = struct.Struct("<I")  # at byte 8
DEADLINE = struct.Struct("<I")  # at byte 28
LENGTHS = struct.Struct("<HH")

BODY_APART = 1  # flag: the body is frame 1
RETURN = 2  # flag: a STEP on its way back from the last stage to the first


class Prefix(NamedTuple):
    """The first 32 bytes of a message.

    `sequence` counts the PARTIALs of the attempt; `epoch` names the broker's incarnation; `deadline` is the time left
    in ms (0 = none).
    """

    version: int
    kind: int
    flags: int = 0
    attempt: int = 0
    sequence: int = 0
    epoch: int = 0
    id: bytes = NO_ID
    deadline: int = 0

    def pack(self) -> bytes:
        return PREFIX.pack(*self)


def read_prefix(head: Any) -> Prefix:
    """The prefix of frame 0 (bytes-like).

    Raises:
        Malformed: too short, too long, or of another protocol version.
    """
    size = len(head)
    if not HEAD <= size <= MAX_FRAME_0:
        raise Malformed(f"frame 0 has {size} bytes, expected {HEAD} to {MAX_FRAME_0}")
    prefix = tuple.__new__(Prefix, PREFIX.unpack_from(head))  # what _make does, without its second check
    if prefix.version != VERSION:
        raise Malformed(f"protocol version {prefix.version}, this side speaks {VERSION}: install one ralmq on both")
    return prefix


def sections(head: Any) -> tuple[int, int]:
    """Ends of the routing and of the inline body within frame 0, in bytes.

    Raises:
        Malformed: a section is longer than allowed or than the frame.
    """
    size = len(head)
    routing, body = LENGTHS.unpack_from(head, PREFIX.size) if size >= HEAD else (0, 0)
    left = size - HEAD - routing - body
    if routing > MAX_ROUTING or body > MAX_BODY_INLINE or not 0 <= left < MAX_TENSORS_INLINE + ALIGNMENT:
        raise Malformed(f"sections of {routing} and {body} bytes do not fit frame 0 of {size} bytes")
    return HEAD + routing, HEAD + routing + body


def restamped(head: Any, *, attempt: int, deadline: int, epoch: int | None = None) -> bytes:
    """A copy of frame 0, read before, with another attempt and deadline (ms left), and epoch where one is given."""
    copy = bytearray(head)  # a zmq Frame cannot be sliced
    ATTEMPT.pack_into(copy, 4, attempt)
    DEADLINE.pack_into(copy, 28, deadline)
    if epoch is not None:
        EPOCH.pack_into(copy, 8, epoch)
    return bytes(copy)
