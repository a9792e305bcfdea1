"""Messages to frames and back: every kind round trip, later versions, bounds on both sides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgpack
import numpy as np
import pytest
import zmq
from ralmq.schema import codec
from ralmq.schema.checks import in_body, text
from ralmq.schema.codec import decode, encode, routing_of
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import BODY_APART, LENGTHS, RETURN, Prefix
from ralmq.schema.limits import (
    HEAD,
    MAX_BODY,
    MAX_BODY_INLINE,
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_TENSORS,
    NO_ID,
    VERSION,
)
from ralmq.schema.message import (
    CODES,
    KINDS,
    Bye,
    Credit,
    Final,
    Hello,
    Kind,
    Request,
    Step,
)
from schema_samples import BODY, ID, LARGE, LONG, SAMPLES, SMALL, address, same


def frames_of(kind: int, routing: Any, body: Any = None, inline: bytes = b"", *apart: Any, flags: int = 0) -> list[Any]:
    """Frames made by hand; `routing` and `body` are msgpack values, or bytes as they stand."""
    first = routing if type(routing) is bytes else msgpack.packb(routing)
    second = b"" if body is None else body if type(body) is bytes else msgpack.packb(body)
    head = Prefix(VERSION, kind, flags).pack() + LENGTHS.pack(len(first), len(second)) + first + second
    return [head + (bytes(-len(head) % 16) + inline if inline else b""), *apart]


def request(body: Any, inline: bytes = b"", *apart: Any, flags: int = 0) -> list[Any]:
    return frames_of(Kind.REQUEST, ["echo"], body, inline, *apart, flags=flags)


def refused(frames: Any, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        decode(frames)


# -- round trip


def test_the_samples_hold_every_kind() -> None:
    assert {type(sample) for sample in SAMPLES} == set(KINDS.values())


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview, zmq.Frame])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_kind_comes_back_from_any_buffer(sample: Any, buffer: Callable[[Any], Any]) -> None:
    stamp: dict[str, Any] = {"id": ID, "attempt": 65535, "sequence": 3, "epoch": 2**32 - 1, "deadline": 2**32 - 1}
    frames = [buffer(bytes(frame)) for frame in encode(sample, **stamp, flags=RETURN)]
    prefix, got = decode(frames)
    assert same(sample, got)
    assert prefix._asdict() == {
        "version": VERSION,
        "kind": CODES[type(sample)],
        "flags": RETURN | (prefix.flags & BODY_APART),
        **stamp,
    }
    assert encode(got, **stamp, flags=prefix.flags) == [bytes(frame) for frame in frames]


def test_a_body_of_up_to_8_kib_rides_in_frame_0_and_a_longer_one_apart() -> None:
    empty = len(msgpack.packb({"body": {"raw": bytes(300)}})) - 300
    fits = Request("echo", body={"raw": bytes(MAX_BODY_INLINE - empty)})
    longer = Request("echo", body={"raw": bytes(MAX_BODY_INLINE - empty + 1)})
    assert [len(encode(message)) for message in (fits, longer)] == [1, 2]
    assert decode(encode(fits))[0].flags == 0
    frames = encode(longer, flags=RETURN)
    assert len(frames[1]) == MAX_BODY_INLINE + 1
    assert decode(frames)[0].flags == RETURN | BODY_APART
    assert same(longer, decode(frames)[1])


def test_tensor_frames_follow_a_body_apart() -> None:
    message = Request("echo", body=LONG, tensors=[SMALL, LARGE, LARGE.T])
    frames = encode(message)
    assert [len(frame) for frame in frames[2:]] == [LARGE.nbytes] * 2
    assert address(frames[2]) == LARGE.ctypes.data
    assert same(message, decode(frames)[1])


def test_the_flag_of_a_body_apart_belongs_to_the_codec() -> None:
    frames = encode(Request("echo", body=BODY, tensors=[LARGE]), flags=BODY_APART | RETURN)
    prefix, message = decode(frames)
    assert (prefix.flags, message.body) == (RETURN, BODY)


def test_the_largest_message_arrives() -> None:
    sizes = [MAX_MESSAGE - 63 * 9000 - 100] + [9000] * 62
    frames = encode(Final(tensors=[np.zeros(size, dtype=np.uint8) for size in sizes]))
    assert len(frames) == MAX_FRAMES
    assert [tensor.nbytes for tensor in decode(frames)[1].tensors] == sizes


def test_defaults_stand_for_what_is_not_there() -> None:
    assert same(decode(frames_of(Kind.HELLO, [ID, "a"]))[1], Hello(ID, "a"))
    assert same(decode(frames_of(Kind.STEP, [], {}))[1], Step())
    assert same(decode(frames_of(Kind.STEP, []))[1], Step())
    assert decode(frames_of(Kind.BYE, []))[0].id == NO_ID


# -- other versions


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_entries_of_a_later_version_are_passed_over(sample: Any) -> None:
    frames = encode(sample)
    prefix, _ = decode(frames)
    routing = [getattr(sample, name) for name, _, _ in codec.plan(type(sample))[0]]
    longer = msgpack.packb([*routing, {"new": [1]}, "field"])
    _, body = LENGTHS.unpack_from(frames[0], 32)
    old = HEAD + len(msgpack.packb(routing))
    rest = frames[0][old : old + body]
    inline = frames[0][old + body + (-(old + body) % 16) :]
    head = prefix.pack() + LENGTHS.pack(len(longer), body) + longer + rest
    if inline:
        head += bytes(-len(head) % 16) + inline
    assert same(sample, decode([head, *frames[1:]])[1])


def test_fields_and_record_entries_of_a_later_version_are_passed_over() -> None:
    assert same(decode(request({"body": BODY, "new": 1}))[1], Request("echo", body=BODY))
    row = [ID, 1, 2, 3, [4], "new"]
    assert decode(frames_of(Kind.STEP, [], {"rows": [row]}))[1].rows == ((ID, 1, 2, 3, (4,)),)
    span = ["m", "f", 0, 1, 2, 3, 4, 5, "new"]
    assert decode(frames_of(Kind.HELLO, [ID, "a", 0, 0, [], 0, False, 0, {}, span]))[1].span[:3] == ("m", "f", 0)


@pytest.mark.parametrize("cls", KINDS.values(), ids=lambda cls: cls.__name__)
def test_a_missing_required_entry_is_refused(cls: type[Any]) -> None:
    sample = next(sample for sample in SAMPLES if type(sample) is cls)
    routing = codec.plan(cls)[0]
    values = [getattr(sample, name) for name, _, _ in routing]
    for count, (name, _, required) in enumerate(routing):
        frames = frames_of(CODES[cls], values[:count])
        if any(needed for _, _, needed in routing[count:]):
            missing = name if required else "lacks"
            refused(frames, f"the routing section lacks {missing}")
        else:
            assert decode(frames)[0].kind == CODES[cls]


def test_a_missing_required_body_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, 99, Needy)
    monkeypatch.setitem(CODES, Needy, 99)
    assert decode(encode(Needy("x")))[1] == Needy("x")
    refused(frames_of(99, [], {"other": 1}), "Needy lacks need")
    refused(frames_of(99, []), "Needy lacks need")


@dataclass(frozen=True, slots=True)
class Needy:
    """A kind as a later version may add it: a body field without a default."""

    need: Annotated[str, "any other note", in_body(text(5))]


def test_an_unknown_kind_is_refused_by_name() -> None:
    refused(frames_of(200, []), "unknown message kind 200: the other side may be newer")


# -- what a receiver refuses


@pytest.mark.parametrize("count", [0, MAX_FRAMES + 1])
def test_too_few_or_too_many_frames(count: int) -> None:
    refused([b""] * count, f"{count} frames, expected 1 to 64")


@pytest.mark.parametrize("frame", [None, 3, "text", ["list"], memoryview(b"abcd" * 20)[::2]])
def test_a_frame_that_is_no_plain_buffer(frame: Any) -> None:
    refused([frame], "no plain buffer")
    refused([*encode(Bye()), frame], "no plain buffer")


def test_frames_of_any_item_type_are_read_as_bytes() -> None:
    frames = encode(Final(tensors=[np.arange(3000.0), np.empty((0, 2)), np.arange(4000.0).reshape(40, 100)]))
    typed = [frames[0], np.frombuffer(frames[1]), memoryview(np.frombuffer(frames[2])).cast("B").cast("d", (40, 100))]
    assert [len(t.buffer) for t in decode(typed)[1].tensors] == [24_000, 0, 32_000]


def test_more_bytes_than_a_message_may_have() -> None:
    half = np.zeros(MAX_MESSAGE // 2, dtype=np.uint8)
    descriptors = [["u8", [half.nbytes], -1], ["u8", [half.nbytes], -2]]
    refused(request({"tensors": descriptors}, b"", half, half), f"bytes, a message has at most {MAX_MESSAGE}")


@pytest.mark.parametrize(
    "routing",
    [b"", b"\xc1", b"\x91", b"\x90\x90", b"\xc7\x00\x05", b"\xd4\x05\x00", b"\xd6\xff\x00\x00\x00\x00", b"\x80"],
)
def test_a_routing_section_that_is_not_one_array(routing: bytes) -> None:
    frames = frames_of(Kind.BYE, routing)
    refused(frames, "msgpack|no array")
    with pytest.raises(Malformed, match=r"msgpack|no array"):
        routing_of(frames[0])


@pytest.mark.parametrize("body", [b"\x90", b"\xc0", b"\x01", b"\xa1a"])
def test_a_body_that_is_no_map(body: bytes) -> None:
    refused(request(body), "the body is no map")
    refused(request(None, b"", body, flags=BODY_APART), "the body is no map")


@pytest.mark.parametrize(
    "body", [b"\x81\xa1\xff\x00", b"\x81\x01\x02", b"\x81\xa1a", b"\xc1", b"\x80\x80", b"\x81\x90\x01"]
)
def test_a_body_that_is_no_msgpack_within_the_limits(body: bytes) -> None:
    refused(request(body), "not msgpack within the limits: .")


@pytest.mark.parametrize("body", [3, [], "x", {b"a": 1}, None])
def test_a_user_body_that_is_no_map_with_text_keys(body: Any) -> None:
    refused(request({"body": body}), "body: expected a map with text keys")


def test_the_body_apart_is_there_once_and_bounded() -> None:
    body = msgpack.packb({"body": {}})
    assert decode(request(None, b"", body, flags=BODY_APART))[1].body == {}
    refused(request(None, flags=BODY_APART), "own frame is missing")
    refused(request({"body": {}}, b"", body, flags=BODY_APART), "not the only body")
    most = MAX_BODY - len(msgpack.packb({"body": {"raw": bytes(70_000)}})) + 70_000
    exact = msgpack.packb({"body": {"raw": bytes(most)}})
    assert len(exact) == MAX_BODY
    assert len(decode(request(None, b"", exact, flags=BODY_APART))[1].body["raw"]) == most
    refused(request(None, b"", exact + b"\xc0", flags=BODY_APART), f"longer than {MAX_BODY} bytes")


F32 = ["f32", [2], 0]
PLACES = "a tensor's frame is missing|does not lie within frame 0"


@pytest.mark.parametrize(
    ("descriptors", "inline", "apart", "reason"),
    [
        ({}, b"", (), "no list of at most 1024"),
        (None, b"", (), "no list of at most 1024"),
        ([["u8", [0], 0]] * (MAX_TENSORS + 1), b"", (), "no list of at most 1024"),
        ([{}], b"", (), "not .dtype, shape, place."),
        ([F32[:2]], bytes(8), (), "not .dtype, shape, place."),
        ([[*F32, 0]], bytes(8), (), "not .dtype, shape, place."),
        ([["f32", [2], None]], bytes(8), (), "not .dtype, shape, place."),
        ([["f32", [2], True]], bytes(8), (), "not .dtype, shape, place."),
        ([["f33", [2], 0]], bytes(8), (), "unknown dtype"),
        ([["f32", [-2], 0]], bytes(8), (), "dimension"),
        ([["f32", [2], 0]], bytes(7), (), PLACES),
        ([["f32", [2], 0]], b"", (), PLACES),
        ([["f32", [2], 8]], bytes(32), (), PLACES),
        ([["f32", [2], 32]], bytes(32), (), PLACES),
        ([["f32", [2], 1 << 40]], bytes(32), (), PLACES),
        ([F32, F32], bytes(32), (), "behind the one before it"),
        ([["f32", [2], 16], F32], bytes(32), (), "behind the one before it"),
        ([["f32", [8], 0], ["f32", [2], 16]], bytes(64), (), "behind the one before it"),
        ([["f32", [2], -1]], b"", (), PLACES),
        ([["f32", [2], -1]], b"", (bytes(7),), PLACES),
        ([["f32", [2], -1]], b"", (bytes(9),), PLACES),
        ([["f32", [2], -2]], b"", (bytes(8),), PLACES),
        ([["f32", [2], -2]], b"", (bytes(8), bytes(8)), "not the next one"),
        ([["f32", [2], -1], ["f32", [2], -1]], b"", (bytes(8),), "not the next one"),
        ([["f32", [2], -2], ["f32", [2], -1]], b"", (bytes(8), bytes(8)), "not the next one"),
        ([["f32", [2], -(1 << 63)]], b"", (bytes(8),), PLACES),
        ([["f32", [2], -1]], b"", (bytes(8), bytes(8)), "1 frames belong to no tensor"),
        ([], b"", (b"",), "1 frames belong to no tensor"),
    ],
)
def test_descriptors_that_do_not_match_the_bytes(descriptors: Any, inline: bytes, apart: Any, reason: str) -> None:
    refused(request({"tensors": descriptors}, inline, *apart), reason)


def test_descriptors_that_match_the_bytes() -> None:
    descriptors = [
        ["f32", [2], 0],
        ["u8", [0, 9], 16],
        ["f32", [], 16],
        ["i8", [3], -1],
        ["u8", [1], 32],
        ["u8", [0], -2],
    ]
    frames = request({"tensors": descriptors}, bytes(range(33)), b"abc", b"")
    tensors = decode(frames)[1].tensors
    assert [bytes(t.buffer) for t in tensors] == [bytes(range(8)), b"", bytes(range(16, 20)), b"abc", b" ", b""]
    assert [t.shape for t in tensors] == [(2,), (0, 9), (), (3,), (1,), (0,)]


def test_a_kind_without_tensors_takes_none() -> None:
    refused(frames_of(Kind.CREDIT, [1], {"tensors": [F32]}, bytes(8)), "Credit carries no tensors")
    refused(frames_of(Kind.CREDIT, [1], None, b"", b"frame"), "belong to no tensor")
    assert decode(frames_of(Kind.CREDIT, [1], {"tensors": []}))[1] == Credit(1)
