"""What a user of torch expects of a tensor, on remote ones; and what a hostile caller can send."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ralmq
import torch
from ralmq.errors import RalmqError, Refused
from ralmq.remote.home import Home
from ralmq.remote.operators import OPERATORS
from ralmq.remote.tensor import RemoteTensor, to_worker
from remote_served import Served
from torch import nn


def test_it_is_formatted_and_converted_as_a_tensor(served: Served) -> None:
    one, many = to_worker(torch.tensor(2.5), "one"), to_worker(torch.ones(2, 3), "one")
    assert f"{one:.3f} {one}" == "2.500 2.5" and math.sqrt(one) == math.sqrt(2.5) and round(float(one)) == 2
    assert "shape=[2, 3]" in f"{many}" and repr(many) == str(many)
    with pytest.raises(TypeError, match="format"):
        f"{many:.3f}"
    wrong = many @ many
    with pytest.raises(RuntimeError):
        wrong.to_here()
    assert "failed: RuntimeError" in repr(wrong)


def test_numpy_leaves_operators_to_it(served: Served) -> None:
    x, own = torch.arange(6.0).reshape(2, 3), np.full((2, 3), 2.0, np.float32)
    remote = to_worker(x, "one")
    for found, wanted in ((own - remote, 2 - x), (remote - own, x - 2), (np.float32(2) * remote, 2 * x)):
        assert isinstance(found, RemoteTensor) and torch.equal(found.to_here(), wanted)
    assert isinstance(own == remote, RemoteTensor)
    with pytest.raises(TypeError, match="to_here"):
        np.asarray(remote)


def test_tensors_of_two_workers_and_of_none(served: Served) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    one, two = to_worker(x, "one"), to_worker(x, "two")
    for value in (torch.cat([x, one, two]), torch.cat([two, x, one])):
        assert torch.equal(value.to_here(), torch.cat([x, x, x]))  # type: ignore[attr-defined]
    assert (x + two).worker == "two" and (one * two).worker == "one"  # type: ignore[attr-defined]
    index = to_worker(torch.tensor([1, 0]), "two")
    assert torch.equal(one[index].to_here(), x[[1, 0]])
    with pytest.raises(TypeError, match="fetch"):
        x.add_(one)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("attribute", AttributeError),
        ("stop", StopIteration),
        ("time", TimeoutError),
        ("name", NameError),
        ("file", FileNotFoundError),
    ],
)
def test_errors_of_modules_are_told_as_they_are(served: Served, kind: str, error: type[Exception]) -> None:
    failing = ralmq.remote("Failing", "one")
    looks: list[Callable[[], Any]] = [failing(1, kind).to_here, lambda: failing(1, kind).shape]
    for look in looks:
        with pytest.raises(error) as raised:
            look()
        assert "remote_modules" in raised.value.remote_traceback
        assert "a remote tensor has no" not in str(raised.value)
    begun = time.monotonic()
    with pytest.raises(RuntimeError if error is StopIteration else error):  # no coroutine may raise that one
        asyncio.run(fetched(failing(1, kind)))
    assert time.monotonic() - begun < 30


async def fetched(value: RemoteTensor) -> Any:
    return await value.fetch()


def test_a_module_that_exits_ends_no_session(served: Served) -> None:
    failing = ralmq.remote("Failing", "one")
    with pytest.raises(RalmqError, match="SystemExit"):
        failing(1, "exit").to_here(deadline=20)
    assert to_worker(torch.ones(1), "one").to_here(deadline=20).tolist() == [1]


def raw(home: Home, verb: str, **fields: Any) -> Any:
    return home.peer("one").ask(verb, fields).result(20)


def test_what_a_hostile_caller_sends_harms_no_other(served: Served) -> None:
    ralmq.remote_copy(nn.Linear(2, 2), "one")
    home = Home(served.url, wait=10, deadline=20)
    try:
        peer = home.peer("one")
        linear = peer.number()
        raw(home, "build", name="nn.Linear", a=["l", ["t"], ["m", "in_features", 2, "out_features", 2]], out=linear)
        deep: list[Any] = ["l"]
        for _ in range(400):
            deep = ["l", deep]
        bad: list[tuple[str, dict[str, Any], type[Exception]]] = [
            ("op", {"op": "operator.pow", "a": ["l", ["t", 10**18, 10**9], ["m"]]}, TypeError),  # for ever, and the GIL
            ("op", {"op": "operator.mul", "a": ["l", ["t", "x", 10**15], ["m"]]}, TypeError),
            ("op", {"op": "operator.mod", "a": ["l", ["t", "%99999999999d", 1], ["m"]]}, TypeError),
            ("op", {"op": "operator.lshift", "a": ["l", ["t", 1, 1 << 50], ["m"]]}, TypeError),
            ("op", {"op": "torch.zeros", "a": ["l", ["t", 1 << 60], ["m"]]}, RuntimeError),
            ("op", {"op": "value", "a": deep}, Exception),
            ("op", {"op": "value", "a": ["l", ["t", ["h", 1]], ["m"]]}, RalmqError),
            ("op", {"op": "value", "a": ["l", ["t", ["x", 7, False]], ["m"]], "grad": True, "out": [1]}, RalmqError),
            ("op", {"op": "value", "a": ["l", ["t", ["h", 1, "ralmq.status", b"x" * 16, ""]], ["m"]]}, Refused),
            ("op", {"op": "value", "a": ["l", ["t", ["h", 1, "module:two", b"x" * 16, "tcp://h:1"]], ["m"]]}, Refused),
            ("stage", {"specs": [["float32", [1 << 50, 1 << 10]]]}, RalmqError),
            ("stage", {"specs": [["float32", [-1]]]}, RalmqError),
            ("parameter", {"module": linear, "name": "__class__.forward"}, KeyError),
            ("parameter", {"module": linear, "name": "weight.grad"}, KeyError),
            ("call", {"module": {}}, RalmqError),
            ("back", {"node": [1]}, RalmqError),
            ("free", {"free": ["x"]}, RalmqError),
            ("eval", {}, Refused),
        ]
        for verb, fields, error in bad:
            with pytest.raises(error):
                raw(home, verb, **{"out": peer.number(), **fields})
        assert to_worker(torch.ones(1), "one").to_here(deadline=20).tolist() == [1]  # another caller
        assert raw(home, "executed")[0] == {"ran": []}  # and this one
    finally:
        home.close()


def test_no_caller_comes_to_what_another_has(served: Served) -> None:
    mine = to_worker(torch.ones(3), "one")
    mine.to_here()
    home = Home(served.url, wait=10, deadline=20)
    try:
        peer = home.peer("one")
        number, key = mine.handle.number, bytes(16)
        with pytest.raises(KeyError, match="no value"):
            raw(home, "fetch", of=number)
        for near in ("", peer.near):  # by way of a worker that asks on its behalf
            with pytest.raises(RalmqError, match="nothing of that caller"):
                raw(home, "op", op="value", a=["l", ["t", ["h", number, peer.service, key, near]], ["m"]], out=9)
        raw(home, "free", free=[number])
    finally:
        home.close()
    assert mine.to_here().tolist() == [1, 1, 1]


def test_python_operators_of_plain_values_are_few(served: Served) -> None:
    """Results that are numbers, of a module, may be added; what can grow without bounds is not done there."""
    size = ralmq.remote("nn.Identity", "one")(5)
    assert (size + 1).to_here() == 6 and "operator.pow" in OPERATORS
    with pytest.raises(TypeError, match="plain values"):
        (size**9).to_here()


class Own(nn.Module):
    """A class that a worker cannot import."""


def test_what_is_given_wrongly_is_said(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ralmq.remote_copy(nn.Linear(2, 2), "one")
    layer: Any = nn.Linear
    tensor: Any = torch.zeros(2)
    workers: Any = ["one"]
    monkeypatch.setattr(Own, "__module__", "__main__")
    for call, said in (
        (lambda: ralmq.remote_copy(Own(), "one"), "Own is a class of this program alone"),
        (lambda: ralmq.remote_copy(tensor, "one"), "takes a torch module, not a Tensor"),
        (lambda: ralmq.remote(layer, "one"), "as 'nn.Linear'"),
        (lambda: ralmq.remote("nn.Linear", "one", 2, 2), "by name, as in_features=4"),
        (lambda: ralmq.from_pretrained("demo", workers), "give each worker its memory"),
        (lambda: ralmq.DataParallel(one), "a list of modules"),  # type: ignore[arg-type]
    ):
        with pytest.raises((Refused, TypeError), match=said):
            call()


def test_a_broker_that_is_not_there_is_not_the_default(served: Served) -> None:
    with pytest.raises(RalmqError):
        ralmq.remote.connect("tcp://127.0.0.1:9", wait=0.2)
    assert ralmq.remote_copy(nn.Linear(2, 2), "one").worker == "one"
