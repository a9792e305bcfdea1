"""Hypothesis strategies: a message of any kind, its prefix, and what can be done to its frames. Knows no test."""

import os
import struct
from typing import Any

import msgpack
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from ralmq.schema.frame import LENGTHS, PREFIX
from ralmq.schema.limits import (
    ALIGNMENT,
    HEAD,
    MAX_ACTIVE,
    MAX_ATTEMPT,
    MAX_DEADLINE_MS,
    MAX_NAME,
    MAX_REASON,
    MAX_SERVICES,
)
from ralmq.schema.message import (
    U31,
    U63,
    Active,
    Beat,
    Bye,
    Cancel,
    Credit,
    Error,
    Final,
    Form,
    Gone,
    Hello,
    Partial,
    Release,
    Request,
    Return,
    Row,
    Span,
    Start,
    Step,
    Welcome,
)
from ralmq.schema.tensor import DTYPES, Tensor

TIMES = int(os.environ.get("RALMQ_FUZZ", "1"))  # how many times the examples of `make test`; then other ones each run


def examples(count: int, **more: Any) -> settings:
    """The same examples each time in `make test`; RALMQ_FUZZ=50 runs fifty times as many, drawn anew."""
    database = None if TIMES == 1 else settings.get_profile("default").database
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=database,
        deadline=None,
        print_blob=True,
        **more,
    )


# -- messages

numbers = st.one_of(st.integers(0, 300), st.integers(0, U31), st.just(U31))
counters = st.one_of(st.integers(0, 300), st.just(U63))
attempts = st.one_of(st.integers(0, 3), st.just(MAX_ATTEMPT))
ids = st.binary(min_size=16, max_size=16)
names = st.one_of(st.sampled_from(["echo", "lm:m", "ralmq.status"]), st.text(min_size=1, max_size=12))
names = st.one_of(names, st.just("n" * MAX_NAME))
notes = st.one_of(st.text(max_size=30), st.just("ż" * (MAX_REASON // 2)))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
maps = st.dictionaries(st.text(max_size=8), values, max_size=4)
facts = st.dictionaries(st.text(max_size=8), scalars.filter(lambda value: not isinstance(value, bytes)), max_size=4)
bodies = st.one_of(maps, st.just({"long": ["word " * 40] * 60}))  # about 12 KiB: a body of its own
active = st.builds(Active, ids, attempts)
layers = st.lists(st.integers(0, 40), min_size=3, max_size=3, unique=True).map(sorted)
spans = layers.flatmap(
    lambda cut: st.builds(
        Span, names, st.text(max_size=64), st.just(cut[0]), st.just(cut[1]), st.just(cut[2]), numbers, numbers, numbers
    )
)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """Up to five tensors of any dtype; some of more than 8 KiB, which have frames of their own."""
    found = []
    for _ in range(draw(st.integers(0, 5))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.one_of(st.lists(st.integers(0, 4), max_size=8), st.sampled_from([[3000], [2, 1025, 8]])))
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype][1]
        pattern = draw(st.binary(min_size=1, max_size=8))
        buffer = (pattern * (size // len(pattern) + 1))[:size]
        found.append(Tensor(dtype, tuple(shape), bytes(size) if dtype == "bool" else buffer))
    return tuple(found)


def _few(inner: st.SearchStrategy[Any], most: int = 4) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(inner, max_size=most).map(tuple)


KIND_OF: dict[type[Any], st.SearchStrategy[Any]] = {
    Hello: st.builds(
        Hello,
        nonce=ids,
        name=names,
        features=numbers,
        pid=numbers,
        services=_few(names, 6) | st.just(("s" * 100,) * MAX_SERVICES),
        capacity=numbers,
        idempotent=st.booleans(),
        stall_ms=numbers,
        labels=facts,
        span=st.none() | spans,
    ),
    Welcome: st.builds(Welcome, features=numbers, beat_ms=st.integers(1, 3_600_000), name=st.just("") | names),
    Beat: st.builds(
        Beat,
        progress=counters,
        busy=numbers,
        active=_few(active) | st.just((Active(bytes(16), 1),) * MAX_ACTIVE),
        gauges=facts,
        heard=counters,
    ),
    Bye: st.builds(Bye),
    Gone: st.builds(Gone, notes),
    Request: st.builds(
        Request,
        service=names,
        priority=st.integers(0, 9),
        window=numbers,
        parent=st.none() | ids,
        wait_ms=st.integers(0, MAX_DEADLINE_MS),
        body=bodies,
        tensors=tensors(),
    ),
    Partial: st.builds(Partial, bodies, tensors()),
    Final: st.builds(Final, bodies, tensors()),
    Error: st.builds(Error, st.text(min_size=1, max_size=64), notes, numbers),
    Cancel: st.builds(Cancel, notes),
    Credit: st.builds(Credit, numbers),
    Form: st.builds(Form, names, numbers, st.integers(1, 4096), numbers, numbers),
    Step: st.builds(
        Step,
        rows=_few(st.builds(Row, ids, attempts, numbers, numbers, _few(numbers, 6))),
        starts=_few(st.builds(Start, numbers, numbers, maps)),
        returns=_few(st.builds(Return, ids, attempts, st.integers(-1, U31), st.booleans())),
        ended=_few(active),
        batch=counters,
        tensors=tensors(),
    ),
    Release: st.builds(Release),
}
messages = st.one_of(*KIND_OF.values())
prefixes = st.fixed_dictionaries(
    {
        "id": ids,
        "attempt": attempts,
        "sequence": st.integers(0, 0xFFFF),
        "epoch": st.integers(0, 0xFFFF_FFFF),
        "deadline": st.integers(0, MAX_DEADLINE_MS),
        "flags": st.sampled_from([0, 2, 254]),
    }
)

# -- what may be done to their frames

Frames = list[bytes]
ODD_SHAPES = st.sampled_from(
    [[0], [1], [2, 2], [-1], [2**28], [2**63], [2**20] * 3, [0, 2**62], [1] * 9, [True], [1.0], "4", None, {}]
)
DESCRIPTORS = st.lists(
    st.one_of(
        st.tuples(
            st.one_of(st.sampled_from([*sorted(DTYPES), "object", "|O", "f128"]), scalars),
            ODD_SHAPES | st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([0, 16, 8, -1, -2, -3, 2**40, -(2**60), None, "0", 1.5]),
        ).map(list),
        values,
    ),
    max_size=4,
)


def _flip(frames: Frames, at: int, where: int, bit: int) -> Frames:
    frame = bytearray(frames[at])
    if frame:
        frame[where % len(frame)] ^= 1 << bit
    return [*frames[:at], bytes(frame), *frames[at + 1 :]]


def _section(frames: Frames, which: int, data: bytes) -> Frames:
    """Routing or body of frame 0 replaced, with the lengths put right as far as two bytes hold them."""
    head = frames[0]
    if len(head) < HEAD:
        return frames
    routing, body = LENGTHS.unpack_from(head, PREFIX.size)
    parts = [head[HEAD : HEAD + routing], head[HEAD + routing : HEAD + routing + body]]
    inline = head[HEAD + routing + body :].lstrip(b"\0")
    parts[which] = data[:0xFFFF]
    new = head[: PREFIX.size] + LENGTHS.pack(len(parts[0]), len(parts[1])) + parts[0] + parts[1]
    return [new + bytes(-len(new) % ALIGNMENT) + inline, *frames[1:]]


def _lengths(frames: Frames, routing: int, body: int) -> Frames:
    head = frames[0]
    if len(head) < HEAD:
        return frames
    return [head[: PREFIX.size] + struct.pack("<HH", routing, body) + head[HEAD:], *frames[1:]]


@st.composite
def mutated(draw: st.DrawFn, frames: Frames) -> Frames:
    """The frames after one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(frames) - 1)) if frames else 0
        act = draw(st.sampled_from(ACTS)) if frames else "insert"
        if act == "flip":
            frames = _flip(frames, at, draw(st.integers(0, 60) | st.integers(0, 1 << 20)), draw(st.integers(0, 7)))
        elif act == "cut":
            frames = [*frames[:at], frames[at][: draw(st.integers(0, len(frames[at])))], *frames[at + 1 :]]
        elif act == "grow":
            frames = [*frames[:at], frames[at] + draw(st.binary(min_size=1, max_size=40)), *frames[at + 1 :]]
        elif act == "swap":
            other = draw(st.integers(0, len(frames) - 1))
            frames = list(frames)
            frames[at], frames[other] = frames[other], frames[at]
        elif act == "drop":
            frames = frames[:at] + frames[at + 1 :]
        elif act == "insert":
            frames = [*frames[:at], draw(st.binary(max_size=40)), *frames[at:]]
        elif act == "repeat":
            frames = frames + [frames[at]] * draw(st.sampled_from([1, 63, 64]))
        elif act == "lengths":
            frames = _lengths(frames, draw(st.integers(0, 0xFFFF)), draw(st.integers(0, 0xFFFF)))
        elif act == "kind":
            frames = [frames[0][:1] + bytes([draw(st.integers(0, 40))]) + frames[0][2:], *frames[1:]]
        elif act == "tensors":
            body = {**draw(maps), "tensors": draw(DESCRIPTORS | values)}
            frames = _section(frames, 1, msgpack.packb(body))
        else:
            frames = _section(frames, draw(st.integers(0, 1)), msgpack.packb(draw(values)))
    return frames


ACTS = ("flip", "flip", "cut", "grow", "swap", "drop", "insert", "repeat", "lengths", "kind", "tensors", "section")
