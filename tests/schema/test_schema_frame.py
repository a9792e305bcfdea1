"""Frame 0: where each field lies, and what is refused before anything is read."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
import zmq
from ralmq.schema.codec import encode, routing_of
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import LENGTHS, PREFIX, Prefix, read_prefix, restamped, sections
from ralmq.schema.limits import (
    HEAD,
    MAX_BODY_INLINE,
    MAX_FRAME_0,
    MAX_ROUTING,
    MAX_TENSORS_INLINE,
    VERSION,
)
from ralmq.schema.message import Bye, Kind, Request

ID = bytes(range(100, 116))
BUFFERS: list[Callable[[bytes], Any]] = [bytes, bytearray, memoryview, zmq.Frame]


def head_of(routing: int, body: int, rest: int) -> bytes:
    return Prefix(VERSION, Kind.BYE).pack() + LENGTHS.pack(routing, body) + bytes(routing + body + rest)


def test_the_layout_of_frame_0() -> None:
    frames = encode(Request("echo"), id=ID, attempt=0x0102, sequence=0x0304, epoch=0x05060708, deadline=0x090A0B0C)
    head = frames[0]
    assert head[:4] == bytes([1, 16, 0, 0])  # version, kind, flags, zero
    assert head[4:12] == bytes([0x02, 0x01, 0x04, 0x03, 0x08, 0x07, 0x06, 0x05])  # attempt, sequence, epoch
    assert head[12:28] == ID
    assert head[28:32] == bytes([0x0C, 0x0B, 0x0A, 0x09])
    routing, body = struct.unpack("<HH", head[32:36])
    assert head[36 : 36 + routing] == b"\x95\xa4echo\x04\x00\xc0\x00"
    assert head[36 + routing :] == b"\x81\xa4body\x80" and body == 7
    assert (PREFIX.size, HEAD) == (32, 36)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_prefix_comes_back_from_any_buffer(buffer: Callable[[bytes], Any]) -> None:
    head = encode(Bye(), id=ID, attempt=7, sequence=70_000, epoch=9, deadline=10, flags=2)[0]
    assert read_prefix(buffer(head)) == Prefix(VERSION, Kind.BYE, 2, 7, 70_000 % 65_536, 9, ID, 10)
    assert read_prefix(buffer(head)).pack() == head[:32]
    assert sections(buffer(head)) == (37, 37)
    assert routing_of(buffer(head)) == []


@pytest.mark.parametrize("size", [0, 1, HEAD - 1, MAX_FRAME_0 + 1])
def test_a_frame_of_impossible_length_is_refused(size: int) -> None:
    with pytest.raises(Malformed, match=f"frame 0 has {size} bytes, expected 36 to {MAX_FRAME_0}"):
        read_prefix(bytes([VERSION]) * size)


@pytest.mark.parametrize("size", [HEAD, MAX_FRAME_0])
def test_a_frame_of_the_extreme_lengths_is_read(size: int) -> None:
    assert read_prefix(bytes([VERSION]) + bytes(size - 1)).version == VERSION


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_protocol_version_is_refused_with_what_to_do(version: int) -> None:
    with pytest.raises(Malformed, match=f"protocol version {version}, this side speaks 1: install one ralmq on both"):
        read_prefix(bytes([version]) + bytes(HEAD))


@pytest.mark.parametrize(
    ("routing", "body", "rest"),
    [
        (0, 0, 0),
        (MAX_ROUTING, 0, 0),
        (0, MAX_BODY_INLINE, 0),
        (1, 2, 3),
        (MAX_ROUTING, MAX_BODY_INLINE, MAX_TENSORS_INLINE + 15),
    ],
)
def test_section_ends(routing: int, body: int, rest: int) -> None:
    head = head_of(routing, body, rest)
    assert len(head) <= MAX_FRAME_0
    assert sections(head) == (HEAD + routing, HEAD + routing + body)


@pytest.mark.parametrize(
    ("routing", "body", "rest"),
    [
        (MAX_ROUTING + 1, 0, 0),
        (0, MAX_BODY_INLINE + 1, 0),
        (5, 5, -1),
        (0, 1, -1),
        (1, 0, -1),
        (0, 0, MAX_TENSORS_INLINE + 16),
    ],
)
def test_sections_out_of_bounds_are_refused(routing: int, body: int, rest: int) -> None:
    head = head_of(routing, body, rest) if rest >= 0 else head_of(routing, body, 0)[:rest]
    with pytest.raises(Malformed, match=f"sections of {routing} and {body} bytes do not fit"):
        sections(head)


@pytest.mark.parametrize("size", [0, 31, 33, HEAD - 1])
def test_sections_of_a_short_frame_are_refused(size: int) -> None:
    with pytest.raises(Malformed, match=f"do not fit frame 0 of {size} bytes"):
        sections(bytes(size))


@pytest.mark.parametrize("data", [b"\x80", b"\xc0", b"\x01", b"\xa1a"])
def test_a_routing_section_that_is_no_array_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed, match="routing section is no array"):
        routing_of(head_of(len(data), 0, 0)[:HEAD] + data)


def test_the_routing_array_is_read_without_the_body() -> None:
    head = encode(Request("echo", 9, 1, ID, 2, {"text": "x"}))[0]
    assert routing_of(head) == ["echo", 9, 1, ID, 2]


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_restamped_copy_differs_in_its_stamp_alone(buffer: Callable[[bytes], Any]) -> None:
    head = encode(Request("echo", body={"a": 1}), id=ID, attempt=1, sequence=2, epoch=3, deadline=4)[0]
    before = read_prefix(head)
    copy = restamped(buffer(head), attempt=0xFFFF, deadline=0xFFFF_FFFF)
    assert type(copy) is bytes
    assert read_prefix(copy) == before._replace(attempt=0xFFFF, deadline=0xFFFF_FFFF)
    assert copy[32:] == head[32:]
    other = restamped(buffer(head), attempt=5, deadline=6, epoch=0)
    assert read_prefix(other) == before._replace(attempt=5, deadline=6, epoch=0)
    assert other[32:] == head[32:]
    assert read_prefix(head) == before
