"""What a sender refuses, and how it says so; what it sends is what the other side takes."""

from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from ralmq.schema.codec import decode, encode
from ralmq.schema.errors import Malformed
from ralmq.schema.limits import MAX_BODY, MAX_FRAMES, MAX_MESSAGE, MAX_TENSORS
from ralmq.schema.message import Beat, Bye, Credit, Error, Final, Gone, Hello, Partial, Request
from schema_samples import ID, LONG, SMALL


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
