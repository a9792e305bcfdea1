"""Messages to frames and back: every kind round trip, later versions, bounds on both sides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    Beat,
    Bye,
    Credit,
    Error,
    Final,
    Gone,
    Hello,
    Kind,
    Partial,
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


# -- what a sender refuses


def unsendable(message: Any, reason: str, **stamp: Any) -> None:
    with pytest.raises(Malformed, match=reason):
        encode(message, **stamp)


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        ({"id": bytes(15)}, "id: expected an id of 16 bytes, got bytes of length 15"),
        ({"id": bytes(17)}, "id: expected an id of 16 bytes"),
        ({"id": "0" * 16}, "id: expected an id of 16 bytes"),
        ({"attempt": -1}, "prefix is out of range"),
        ({"attempt": 65_536}, "prefix is out of range"),
        ({"epoch": 2**32}, "prefix is out of range"),
        ({"deadline": 2**32}, "prefix is out of range"),
        ({"deadline": 0.5}, "prefix is out of range"),
        ({"flags": 256}, "prefix is out of range"),
    ],
)
def test_a_stamp_out_of_range(stamp: dict[str, Any], reason: str) -> None:
    unsendable(Bye(), reason, **stamp)


@pytest.mark.parametrize("message", ["text", None, {"service": "echo"}, Request])
def test_what_is_no_message(message: Any) -> None:
    unsendable(message, "is no message: use one of Hello, Welcome")


def test_a_field_out_of_range_is_named() -> None:
    unsendable(Request(""), "^service: expected text of 1 to 128 characters")
    unsendable(Request("x" * 129), "^service: ")
    unsendable(Request("echo", priority=10), "^priority: expected a whole number from 0 to 9, got 10")
    unsendable(Request("echo", window=np.int64(3)), "^window: expected a whole number")  # type: ignore[arg-type]
    unsendable(Request("echo", body={1: 2}), "^body: expected a map with text keys")  # type: ignore[dict-item]
    unsendable(Request("echo", body=[1]), "^body: expected a map with text keys, got list of length 1")  # type: ignore[arg-type]
    unsendable(Credit(-1), "^until: ")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.float32("nan"), r"a numpy.float32 cannot travel in a body: convert a number with .item\(\)"),
        (np.float16(1), "a numpy.float16 cannot travel in a body"),
        (np.int64(3), "a numpy.int64 cannot travel in a body"),
        (np.bool_(True), "a numpy.bool.* cannot travel in a body"),
        (np.zeros(3), "a numpy.ndarray cannot travel in a body: .*pass an array as a tensor"),
        (object(), "a object cannot travel in a body: use text, numbers, bytes, lists and maps"),
        ({1, 2}, "a set cannot travel in a body"),
        (1 + 2j, "a complex cannot travel in a body"),
        (2**64, "a whole number in a body must lie between"),
        (-(2**63) - 1, "a whole number in a body must lie between"),
        ("\ud800", "the body cannot travel: .*surrogates not allowed"),
        (memoryview(b"abcd")[::2], "the body cannot travel: .*contiguous"),
        ({"deep": {1: 2}}, "the body cannot travel: .*int is not allowed for map key"),
        ({(1, 2): 3}, "the body cannot travel: "),
        (msgpack.ExtType(5, b""), "the body cannot travel: msgpack extension type 5 is not used here"),
        (msgpack.Timestamp(1), "the body cannot travel: "),
        (list(range(65_537)), "the body cannot travel: .*max_array_len"),
        ({str(n): n for n in range(65_537)}, "the body cannot travel: .*max_map_len"),
        ([[]] * 32_768, "more than 32768 lists and maps: send tensors instead"),
        ([{}] * 32_768, "more than 32768 lists and maps: send tensors instead"),
        (bytes(MAX_BODY), f"the body has {MAX_BODY + 18} bytes, at most {MAX_BODY} may travel: send tensors instead"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_body_that_cannot_travel_is_refused_with_what_to_do(value: Any, reason: str) -> None:
    for cls in (Partial, Final):
        unsendable(cls({"value": value}), reason)


def test_a_body_that_nests_without_end() -> None:
    circle: list[Any] = []
    circle.append(circle)
    unsendable(Final({"circle": circle}), "the body cannot travel: recursion limit")
    deep: list[Any] = []
    sent = 0
    for _ in range(1500):
        deep = [deep]
        try:
            frames = encode(Final({"deep": deep}))
        except Malformed as error:
            assert error.message.startswith("the body cannot travel: ")
        else:
            decode(frames)  # what is sent is taken
            sent += 1
    assert 100 < sent < 1500


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("-inf"), np.float64(0.5), 2**64 - 1, -(2**63), "", b"", list(range(65_536)), "é" * 9000],
)
def test_a_body_at_the_bounds_travels(value: Any) -> None:
    got = decode(encode(Final({"value": value})))[1].body["value"]
    assert got == value or (got != got and value != value)
    assert type(got) is (float if isinstance(value, float) else type(value))


def test_as_many_lists_as_may_be() -> None:
    value = [[]] * 32_765  # and the list, the user's map and the body
    assert decode(encode(Final({"value": value})))[1].body["value"] == value
    unsendable(Final({"value": [*value, []]}), "more than 32768 lists and maps")


def test_a_routing_section_that_is_too_long() -> None:
    unsendable(
        Hello(ID, "a", services=("s" * 128,) * 32),
        "the routing has 4[0-9]+ bytes, at most 4096 may travel: use shorter",
    )
    unsendable(Beat(gauges={"x": np.float32(1)}), "a numpy.float32 cannot travel")


def test_an_error_travels_whatever_it_says() -> None:
    for message in ("x" * 100_000, "\N{SNOWMAN}" * 100_000, "\N{OLD ITALIC LETTER A}" * 5000, "bad \ud800 name"):
        for sample in (Error("\N{OLD ITALIC LETTER A}" * 64, message), Gone(message), Gone("short")):
            got = decode(encode(sample))[1]
            said = got.message if isinstance(got, Error) else got.reason
            sent = sample.message if isinstance(sample, Error) else sample.reason
            assert said and sent.encode("utf-8", "replace").decode().startswith(said)
    assert decode(encode(Error("x", "short")))[1].message == "short"


def test_oversize_tensors_are_refused_by_the_sender() -> None:
    frame = np.zeros(9000, dtype=np.uint8)
    unsendable(Final(tensors=[frame] * MAX_FRAMES), "65 frames, a message has at most 64: join tensors or send fewer")
    unsendable(Final(LONG, tensors=[frame] * (MAX_FRAMES - 1)), "65 frames")
    assert len(encode(Final(tensors=[frame] * (MAX_FRAMES - 1)))) == MAX_FRAMES
    whole = np.zeros(MAX_MESSAGE, dtype=np.uint8)
    unsendable(Final(tensors=[whole]), f"bytes, a message has at most {MAX_MESSAGE}: send it in parts")
    unsendable(Final(tensors=[whole, whole[:1]]), f"more than {MAX_MESSAGE} bytes in one message: send them in parts")
    empty = np.empty(0)
    assert len(decode(encode(Final(tensors=[empty] * MAX_TENSORS)))[1].tensors) == MAX_TENSORS
    unsendable(Final(tensors=[empty] * (MAX_TENSORS + 1)), "1025 tensors, a message has at most 1024")


@pytest.mark.parametrize("tensors", [SMALL, {"a": SMALL}, "text", None])
def test_tensors_that_are_no_list(tensors: Any) -> None:
    unsendable(replace(Final(), tensors=tensors), "tensors must be a list, got one .*: put it into")
