"""One or more messages of every kind, and how to compare what came back with what was sent."""

from dataclasses import fields
from typing import Any

import numpy as np
from ralmq.schema.message import (
    Active,
    Beat,
    Bye,
    Cancel,
    Credit,
    Direct,
    Error,
    Final,
    Form,
    Gone,
    Hello,
    Message,
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
from ralmq.schema.tensor import tensor_of

ID = bytes(range(16))
OTHER = bytes(range(16, 32))
SMALL = np.arange(12, dtype=np.float32).reshape(3, 4)
LARGE = np.arange(6000, dtype=np.int32).reshape(60, 100)  # 24,000 bytes: a frame of its own
BODY = {"text": "żółw", "n": -3, "x": 0.5, "none": None, "yes": True, "raw": b"\x00\xff", "deep": [1, [2, {"a": []}]]}
LONG = {"texts": ["word " * 40] * 60}  # about 12 KiB: a body of its own

SAMPLES: list[Message] = [
    Hello(ID, "client-0001"),
    Hello(
        nonce=OTHER,
        name="stage-beef",
        features=1,
        pid=4711,
        services=("lm:demo", "echo"),
        capacity=8,
        idempotent=True,
        stall_ms=30_000,
        labels={"zone": "a", "shard": 0},
        span=Span("demo", "f" * 64, 3, 6, 6, 512, 32, 2048),
    ),
    Welcome(),
    Welcome(features=0, beat_ms=250, name="echo-00aa"),
    Beat(),
    Beat(progress=2**40, busy=2, active=(Active(ID, 1), Active(OTHER, 65535)), gauges={"rows": 8, "rate": 1.5}),
    Bye(),
    Gone(),
    Gone("this attempt is over"),
    Request("echo"),
    Request("search:docs", 0, 64, OTHER, 5000, BODY, (SMALL, LARGE)),
    Request("echo", body=LONG, tensors=[LARGE, SMALL, LARGE.astype(np.float64)]),
    Partial(),
    Partial({"text": "hi", "tokens": [1, 2, 3], "position": 7}, (SMALL,)),
    Final(),
    Final({"finish_reason": "stop", "usage": {"prompt": 3}}, (LARGE,)),
    Error("busy", "the queue of echo is full", 250),
    Error("of_a_later_version"),
    Cancel(),
    Cancel("the reader is gone"),
    Credit(128),
    Form("demo", 0, 2, 512, 32),
    Form("demo", 1, 2, 512, 32, Direct("host", "key", "ipc://@near", "tcp://10.0.0.2:4000")),
    Step(),
    Step(
        rows=(Row(ID, 1, 0, 5, (3, 4)), Row(OTHER, 2, 17, 1, ())),
        starts=(Start(0, 5, {"seed": 1, "temperature": 0.5}),),
        batch=2**33,
        tensors=(SMALL, np.arange(5, dtype=np.int32)),
    ),
    Step(returns=(Return(ID, 1, -1, False), Return(OTHER, 2, 4095, True)), ended=(Active(ID, 1),), batch=3),
    Release(),
]


def same(sent: Any, got: Any) -> bool:
    """Whether a decoded message equals the one that was encoded: fields, and tensors by dtype, shape and bytes."""
    if type(sent) is not type(got):
        return False
    for entry in fields(sent):
        a, b = getattr(sent, entry.name), getattr(got, entry.name)
        if entry.name != "tensors":
            if a != b or type(a) is not type(b):
                return False
        elif [described(tensor) for tensor in a] != [described(tensor) for tensor in b]:
            return False
    return True


def described(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor's dtype, shape and bytes."""
    tensor = tensor_of(value)
    return tensor.dtype, tensor.shape, bytes(tensor.buffer)


def address(buffer: Any) -> int:
    """Where the first byte of a buffer lies in memory."""
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
