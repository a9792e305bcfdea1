"""`decode` on generated messages and on whatever may become of them: a message or Malformed, at a bounded cost.

Fixed samples under random changes are in tests/schema; here the messages are drawn too, and a failure is shrunk.
"""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from fuzz.messages import KIND_OF, Frames, examples, messages, mutated, prefixes
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from ralmq.schema.codec import decode, encode, routing_of
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import LENGTHS, PREFIX, Prefix
from ralmq.schema.limits import ALIGNMENT, MAX_BODY, MAX_BODY_INLINE, MAX_FRAMES, MAX_ROUTING, NO_ID, VERSION
from ralmq.schema.message import CODES, KINDS, Kind
from schema_samples import same

CALLS = 40_000  # Python calls that any message may cost beside one for each entry, which has a byte at least


def frames_of(message: Any, **prefix: Any) -> Frames:
    return [bytes(frame) for frame in encode(message, **prefix)]


def outcome(frames: Frames) -> tuple[Prefix, Any] | None:
    """What decode makes of them; None for Malformed. Any other exception is the finding."""
    try:
        prefix, message = decode(frames)
    except Malformed as error:
        assert error.message
        return None
    for tensor in getattr(message, "tensors", ()):
        assert tensor.numpy().shape == tensor.shape
    again = decode(encode(message, **stamp_of(prefix)))
    assert again[0]._replace(flags=0) == prefix._replace(flags=0) and same(message, again[1]), "it can be sent on"
    return prefix, message


def stamp_of(prefix: Prefix) -> dict[str, Any]:
    """A prefix as the keywords of encode."""
    return {name: value for name, value in prefix._asdict().items() if name not in {"version", "kind"}}


def test_every_kind_is_drawn() -> None:
    assert set(KIND_OF) == set(KINDS.values())


@pytest.mark.parametrize("cls", KIND_OF, ids=lambda cls: cls.__name__)
def test_what_is_encoded_comes_back(cls: type[Any]) -> None:
    @examples(25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(KIND_OF[cls], prefixes)
    def come_back(message: Any, prefix: dict[str, Any]) -> None:
        try:
            frames = encode(message, **prefix)
        except Malformed as error:  # together the fields may be more than a section holds
            assert "at most" in error.message
            return
        got, decoded = decode(frames)
        assert got.kind == CODES[cls] and same(message, decoded)
        assert all(getattr(got, name) == value for name, value in prefix.items() if name != "flags")
        assert got.flags | 1 == prefix["flags"] | 1, "all but that of a body apart"

    come_back()


@examples(700, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_a_changed_message_is_a_message_or_malformed(data: st.DataObject) -> None:
    try:
        frames = frames_of(data.draw(messages), id=bytes(range(16)), attempt=1)
    except Malformed:
        return
    outcome(data.draw(mutated(frames)))


@examples(200)
@given(st.lists(st.binary(max_size=80), max_size=4), st.sampled_from(sorted(KINDS)), st.binary(max_size=60))
def test_bytes_behind_a_right_prefix(rest: Frames, kind: int, sections: bytes) -> None:
    cut = len(sections) // 2
    lengths = LENGTHS.pack(cut, len(sections) - cut)
    outcome([PREFIX.pack(VERSION, kind, 0, 0, 0, 0, NO_ID, 0) + lengths + sections, *rest])


# -- what it may cost, counted: bytes allocated at once, and calls of Python functions


BOMBS: dict[str, Callable[[int], bytes]] = {
    "arrays in arrays": lambda size: b"\x91" * (size - 1) + b"\xc0",
    "maps in maps": lambda size: b"\x81\xa0" * (size // 2 - 1) + b"\xc0",
    "claims of arrays": lambda size: b"\xdc\xff\xff" * (size // 3),
    "claims of huge arrays": lambda size: b"\xdd\xff\xff\xff\xff" * (size // 5),
    "claims of huge maps": lambda size: b"\xdf\xff\xff\xff\xff" * (size // 5),
    "claims of long text": lambda size: b"\x94" + b"\xdb\xff\xff\xff\xff" + b"x" * (size - 6),
    "claims of long bytes": lambda size: b"\xc6\x7f\xff\xff\xff" * (size // 5),
    "extensions": lambda size: b"\x9f" + b"\xc7\x04\x01abcd" * (size // 7),
    "empty maps": lambda size: _array(size - 3, b"\x80"),
    "empty arrays": lambda size: _array(size - 3, b"\x90"),
    "nothing at all": lambda size: _array(size - 3, b"\xc0"),
    "rows of nothing": lambda size: _array((size - 3) // 6, b"\x95\xc0\xc0\xc0\xc0\xc0"),
    "equal keys": lambda size: b"\xde" + (min((size - 3) // 3, 0xFFFF)).to_bytes(2, "big") + b"\xa1a\xc0" * (size // 3),
    "descriptors": lambda size: b"\x81\xa7tensors" + _array((size - 12) // 10, b"\x93\xa3f32\x93\xcd\xff\xff\x01\x00"),
}


def _array(count: int, entry: bytes) -> bytes:
    count = min(count, 0xFFFF)
    return b"\xdc" + count.to_bytes(2, "big") + entry * count


def packed_in(place: str, kind: int, bomb: Callable[[int], bytes]) -> tuple[Frames, int]:
    """A message with the bomb as one of its sections, and how many bytes it has."""
    size = {"routing": MAX_ROUTING, "body": MAX_BODY_INLINE, "apart": MAX_BODY}[place]
    data = bomb(size)[:size]
    flags, lengths, sections = 0, (len(data), 0), data
    if place == "body":
        lengths, sections = (1, len(data)), b"\x90" + data
    elif place == "apart":
        flags, lengths, sections = 1, (1, 0), b"\x90"
    head = PREFIX.pack(VERSION, kind, flags, 0, 0, 0, NO_ID, 0) + LENGTHS.pack(*lengths) + sections
    frames = [head, data] if place == "apart" else [head]
    return frames, sum(map(len, frames))


@pytest.mark.parametrize("place", ["routing", "body", "apart"])
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_its_bytes_allow(name: str, place: str) -> None:
    """32 times the bytes of its message is what a section of small values needs in memory."""
    for kind in KINDS if place == "routing" else (Kind.REQUEST, Kind.STEP, Kind.CREDIT):
        frames, size = packed_in(place, kind, BOMBS[name])
        peak, calls = cost_of(lambda frames=frames: outcome(frames))  # type: ignore[misc]
        assert peak < 1_000_000 + 32 * size, (KINDS[kind].__name__, peak)
        assert calls < CALLS + size, (KINDS[kind].__name__, calls)
        if place == "routing":
            peak, calls = cost_of(lambda frames=frames: _routing(frames))  # type: ignore[misc]
            assert peak < 1_000_000 and calls < 2 * size


def _routing(frames: Frames) -> None:
    try:
        routing_of(frames[0])
    except Malformed:
        return


@pytest.mark.parametrize("count", [MAX_FRAMES - 1, MAX_FRAMES, 100_000])
def test_many_frames_cost_little(count: int) -> None:
    frames = frames_of(KINDS[Kind.FINAL]()) + [bytes(8)] * count
    peak, calls = cost_of(lambda: outcome(frames))
    assert outcome(frames) is None
    assert peak < 100_000 and calls < 1000


@pytest.mark.parametrize("claims", [1, 60, 1024])
def test_descriptors_that_share_one_small_buffer_are_refused(claims: int) -> None:
    """Else a message of a few KiB would unfold to gigabytes where its tensors are copied."""
    entry = b"\x93\xa2u8\x91\xcd\x1f\x00\x00"
    body = b"\x81\xa7tensors" + _array(claims, entry)[: MAX_BODY_INLINE - 9]
    head = PREFIX.pack(VERSION, Kind.FINAL, 0, 0, 0, 0, NO_ID, 0) + LENGTHS.pack(1, len(body)) + b"\x90" + body
    frames = [head + bytes(-len(head) % ALIGNMENT) + bytes(0x1F00)]
    assert (outcome(frames) is not None) == (claims == 1)


def cost_of(act: Callable[[], object]) -> tuple[int, int]:
    """Most bytes allocated at once, and calls of Python functions."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    tracemalloc.start()
    try:
        act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(before)
    return peak, calls
