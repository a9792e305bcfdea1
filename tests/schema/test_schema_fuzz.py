"""Whatever arrives: `decode` answers with a message or with Malformed, never with anything else, and stays cheap."""

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import msgpack
import pytest
import zmq
from ralmq.schema.codec import decode, encode, unpacked
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import LENGTHS, PREFIX
from ralmq.schema.limits import ALIGNMENT, MAX_BODY, MAX_CONTAINERS, MAX_FRAME_0, VERSION
from ralmq.schema.message import CODES, KINDS, Kind
from ralmq.schema.tensor import DTYPES
from schema_samples import ID, SAMPLES

Frames = list[bytes]
VALID: list[Frames] = [[bytes(frame) for frame in encode(sample, id=ID, attempt=1)] for sample in SAMPLES]
ROUNDS = 100_000


def test_decode_is_total() -> None:
    rng = random.Random(20260101)
    outcomes: Counter[str] = Counter()
    kinds: Counter[int] = Counter()
    for n in range(ROUNDS):
        make = MAKERS[n % len(MAKERS)]
        frames = make(rng)
        buffer = rng.choice(BUFFERS)
        try:
            prefix, message = decode([buffer(frame) for frame in frames])
        except Malformed as error:
            assert error.message
            outcomes[f"{make.__name__} refused"] += 1
            continue
        outcomes[f"{make.__name__} accepted"] += 1
        kinds[prefix.kind] += 1
        for tensor in getattr(message, "tensors", ()):
            assert tensor.numpy().shape == tensor.shape
        again = decode(encode(message, id=prefix.id))[1]  # what is taken can be sent on
        assert type(again) is type(message)
    assert outcomes.total() == ROUNDS
    assert set(kinds) == set(KINDS), "every kind was accepted at times"
    for make in MAKERS:
        assert outcomes[f"{make.__name__} refused"] > ROUNDS / 200
        if make is not noise:
            assert outcomes[f"{make.__name__} accepted"] > ROUNDS / 1000


BUFFERS: list[Callable[[bytes], Any]] = [bytes, bytes, memoryview, bytearray, zmq.Frame]


def valid(rng: random.Random) -> Frames:
    return list(rng.choice(VALID))


def noise(rng: random.Random) -> Frames:
    """Random bytes, at times behind a prefix and lengths that could be right."""
    frames = [
        rng.randbytes(rng.choice((0, 1, 35, 36, 37, 60, 300, 5000))) for _ in range(rng.choice((0, 70, *[1, 2] * 8)))
    ]
    if frames and rng.random() < 0.7:
        routing, body = rng.randrange(40), rng.randrange(40)
        rest = rng.randbytes(routing + body + rng.choice((0, 0, 16, 100)))
        frames[0] = head_of(rng, rng.choice(list(KINDS)), routing, body) + rest
    return frames


def flipped(rng: random.Random) -> Frames:
    """A few bits of one frame, mostly of its first bytes, the other way round."""
    frames = valid(rng)
    at = rng.randrange(len(frames))
    frame = bytearray(frames[at])
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        if frame:
            frame[rng.randrange(min(len(frame), rng.choice((40, 100, 1000, 1 << 20))))] ^= 1 << rng.randrange(8)
    frames[at] = bytes(frame)
    return frames


def cut(rng: random.Random) -> Frames:
    """A frame that ends too early, or goes on; at times a section, with its length put right."""
    frames = valid(rng)
    if rng.random() < 0.6:
        start = PREFIX.size + LENGTHS.size
        lengths = list(LENGTHS.unpack_from(frames[0], PREFIX.size))
        ends = [start, start + lengths[0], start + sum(lengths), len(frames[0])]
        parts = [frames[0][a:b] for a, b in pairwise(ends)]
        which = rng.choice((0, 1))
        parts[which] = parts[which][: rng.randrange(len(parts[which]) + 1)] + rng.choice(TAILS)
        lengths[which] = len(parts[which])
        frames[0] = frames[0][: PREFIX.size] + LENGTHS.pack(*lengths) + b"".join(parts)
        return frames
    at = rng.randrange(len(frames))
    keep = rng.randrange(len(frames[at]) + 1)
    frames[at] = frames[at][:keep] + rng.randbytes(rng.choice((0, 0, 1, 4, 16)))
    return frames


def spliced(rng: random.Random) -> Frames:
    """The start of one message and the end of another; or one's prefix before another's sections."""
    first, second = valid(rng), valid(rng)
    at = rng.choice((32, 36, rng.randrange(len(first[0]) + 1)))
    tail = second[0][at:] if rng.random() < 0.5 else second[0][rng.randrange(len(second[0]) + 1) :]
    return [first[0][:at] + tail, *rng.choice((first, second))[1:]]


def shuffled(rng: random.Random) -> Frames:
    """Frames swapped, left out, doubled, or taken from another message."""
    frames = valid(rng)
    for _ in range(rng.choice((1, 2))):
        act = rng.randrange(4)
        if act == 0:
            rng.shuffle(frames)
        elif act == 1 and frames:
            frames.pop(rng.randrange(len(frames)))
        elif act == 2 and frames:
            frames.insert(rng.randrange(len(frames) + 1), rng.choice(frames))
        else:
            frames.insert(rng.randrange(len(frames) + 1), rng.choice(valid(rng)))
    return frames


def built(rng: random.Random) -> Frames:
    """Sections of right msgpack with the wrong types, counts and ranges."""
    kind = rng.choice(list(KINDS))
    sample = rng.choice([sample for sample in SAMPLES if CODES[type(sample)] == kind])
    template = unpacked_frames([bytes(frame) for frame in encode(sample)])
    routing = mutated(rng, template[0]) if rng.random() < 0.7 else template[0]
    body = mutated(rng, template[1]) if rng.random() < 0.7 else template[1]
    if isinstance(body, dict) and rng.random() < 0.4:
        body["tensors"] = [descriptor(rng) for _ in range(rng.randrange(4))]
    first, second = packed(routing), packed(body) if rng.random() < 0.95 else b""
    apart = rng.random() < 0.1
    head = head_of(rng, kind, len(first), 0 if apart else len(second), flags=int(apart)) + first + second * (not apart)
    head += bytes(-len(head) % ALIGNMENT) + rng.randbytes(rng.choice((0, 4, 8, 64, 400)))
    return [head, *[second] * apart, *(bytes(rng.choice((0, 4, 8, 48))) for _ in range(rng.choice((0, 0, 0, 1, 2))))]


MAKERS = [noise, flipped, cut, spliced, shuffled, built]
TAILS = [b"", b"", b"\xc0", b"\x90", b"\x80", b"\xdc\xff\xff", b"\xc4\x05abcde", b"\xa3abc", b"\xcb" + bytes(8)]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.0, float("nan"), float("inf"),
    "", "a", "x" * 200, "\N{SNOWMAN}" * 100, b"", bytes(16), bytes(15), b"\xff" * 16, [], [[]], {},
    {"a": {}}, {b"a": 1}, [ID, 0], [ID, 1, 2, 3, [4]], [0] * 300, ["f32", [2], 0],
]  # fmt: skip


def head_of(rng: random.Random, kind: int, routing: int, body: int, flags: int | None = None) -> bytes:
    flag = rng.randrange(4) if flags is None else flags
    return PREFIX.pack(VERSION, kind, flag, 1, 0, 0, ID, 0) + LENGTHS.pack(routing, body)


def unpacked_frames(frames: Frames) -> tuple[Any, Any]:
    """Routing and body of a valid message as msgpack holds them."""
    routing, body = LENGTHS.unpack_from(frames[0], PREFIX.size)
    start = PREFIX.size + LENGTHS.size
    data = frames[0][start + routing : start + routing + body] or (frames[1] if len(frames) > 1 else b"\x80")
    return msgpack.unpackb(frames[0][start : start + routing]), msgpack.unpackb(data)


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one part of it, at any depth, replaced, removed or doubled."""
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        act = rng.randrange(6)
        copy = list(value)
        if act == 0:
            del copy[at:]
        elif act == 1:
            copy.insert(at, deepcopy(rng.choice(ODD)))
        else:
            copy[at] = mutated(rng, value[at])
        return copy
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        copy_of = dict(value)
        if rng.randrange(5) == 0:
            del copy_of[key]
        else:
            copy_of[key] = mutated(rng, value[key])
        return copy_of
    return deepcopy(rng.choice(ODD))


def descriptor(rng: random.Random) -> Any:
    shape = [rng.choice((0, 1, 2, 2, 3, 2**28, 2**63, -1)) for _ in range(rng.choice((0, 1, 1, 2, 3, 9)))]
    place = rng.choice((0, 0, 16, 32, 8, 2**40, -1, -1, -2, -3, -(2**60)))
    entry: list[Any] = [rng.choice([*DTYPES, "f33"]), shape, place]
    return entry if rng.random() < 0.9 else mutated(rng, entry)


def packed(value: Any) -> bytes:
    data: bytes = msgpack.packb(value)
    return data if len(data) < 0xFFFF else b"\xc0"


# -- what a few bytes may cost


def array(count: int, entry: bytes) -> bytes:
    """`count` times `entry` in an array of arrays, each as long as an array may be."""
    full, rest = divmod(count, 60_000)
    parts = [b"\xdc" + size.to_bytes(2, "big") + entry * size for size in [60_000] * full + [rest]]
    return b"\xdc" + len(parts).to_bytes(2, "big") + b"".join(parts)


KEYS = b"".join(b"\xa3" + f"{n:03x}".encode() + b"\xc0" for n in range(4096))
ATTACKS = {
    "empty maps": array(MAX_BODY - 200, b"\x80"),
    "empty arrays": array(MAX_BODY - 200, b"\x90"),
    "maps of one": array((MAX_BODY - 200) // 3, b"\x81\xa0\xc0"),
    "maps in maps": array(MAX_BODY // 1900, b"\x81\xa0" * 900 + b"\xc0"),
    "arrays in arrays": array(MAX_BODY // 1000, b"\x91" * 900 + b"\xc0"),
    "maps of many": array(MAX_BODY // (len(KEYS) + 3) - 1, b"\xde\x10\x00" + KEYS),
    "short strings": array((MAX_BODY - 200) // 3, b"\xa2ab"),
    "small numbers": array((MAX_BODY - 200) // 3, b"\xcd\x10\x10"),
    "nothing": array(MAX_BODY - 200, b"\xc0"),
    "no end": b"\x91" * MAX_BODY,
}
CLAIMS = {
    "long arrays": b"\xdc\xff\xff",
    "long arrays, 4 bytes": b"\xdd\x00\x00\xff\xff",
    "as long as the section": b"\xdc\x10\x00",
    "one entry before the next": b"\xdc\x10\x00\xc0",
    "in maps": b"\x81\xa0\xdc\x10\x00",
    "long maps": b"\xde\x10\x00\xa0",
}


def peak_of(data: bytes) -> tuple[int, bool]:
    """Most bytes allocated at once while `data` is unpacked, and whether it was accepted."""
    tracemalloc.start()
    try:
        unpacked(data)
        accepted = True
    except Malformed:
        accepted = False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, accepted


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_body_of_1_mib_unfolds_to_no_more_than_32(attack: str) -> None:
    data = ATTACKS[attack]
    assert MAX_BODY * 0.8 < len(data) <= MAX_BODY
    peak, accepted = peak_of(data)
    assert peak < 32 * MAX_BODY
    assert accepted == (attack in {"short strings", "small numbers", "nothing", "maps of many"})


@pytest.mark.parametrize("size", [2000, MAX_FRAME_0, MAX_BODY])
@pytest.mark.parametrize("claim", CLAIMS)
def test_claimed_entries_cost_nothing_until_they_are_there(claim: str, size: int) -> None:
    peak, accepted = peak_of(CLAIMS[claim] * (size // len(CLAIMS[claim])))
    assert not accepted
    assert peak < 1_000_000 + 2 * size


@pytest.mark.parametrize("claims", [1, 8, 9, 70, 80])
def test_a_few_claims_cost_little_each(claims: int) -> None:
    peak, accepted = peak_of(b"\xdc\xff\xff" * claims + bytes(70_000))
    assert not accepted
    assert peak < 8 * 600_000


@pytest.mark.parametrize("cls", ["map", "array"])
def test_as_many_containers_as_may_be_and_one_more(cls: str) -> None:
    entry = b"\x80" if cls == "map" else b"\x90"
    most = b"\xdc" + (MAX_CONTAINERS - 1).to_bytes(2, "big") + entry * (MAX_CONTAINERS - 1)
    assert len(unpacked(most)) == MAX_CONTAINERS - 1
    with pytest.raises(Malformed, match="more than 32768 lists and maps: send tensors instead"):
        unpacked(b"\xdc\x80\x00" + entry * MAX_CONTAINERS)


def test_many_long_arrays_that_are_whole_are_read() -> None:
    rows = [list(range(100))] * 200
    assert unpacked(msgpack.packb(rows)) == rows
    assert Kind.STEP in KINDS
