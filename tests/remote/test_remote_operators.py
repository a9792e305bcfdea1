"""Every operator on remote tensors against the same on local ones: values, shapes, dtypes, errors."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ralmq.errors import WorkerFailed
from ralmq.remote.operators import OPERATORS, name_of
from ralmq.remote.tensor import RemoteTensor, to_worker
from remote_served import Served
from torch.nn import functional

_BINARY = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"}
_BINARY |= {"eq", "ne", "lt", "le", "gt", "ge"}
BINARY = [name for name in dir(operator) if name in _BINARY]
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "+": operator.pos,
    "abs": abs,
    "~": operator.invert,
    "T": lambda x: x.T,
    "mT": lambda x: x.mT,
    "argmax": lambda x: x.argmax(dim=-1),
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.float().mean(0, keepdim=True),
    "exp": torch.exp,
    "relu": functional.relu,
    "softmax": lambda x: functional.softmax(x.double(), dim=-1),
    "reshape": lambda x: x.reshape(-1),
    "shape": lambda x: tuple(x.shape),
    "ndim": lambda x: x.ndim,
    "dtype": lambda x: x.dtype,
    "requires_grad": lambda x: x.requires_grad,
    "len": len,
    "list": list,
    "numel": lambda x: x.numel(),
    "topk": lambda x: x.topk(1).values,
    "split": lambda x: x.split(1),
    "max": lambda x: x.max(dim=0),
    "stack": lambda x: torch.stack([x, x]),
    "where": lambda x: torch.where(x > 0, x, -x),
    "bool": bool,
    "float": float,
    "int": int,
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "cast": lambda x: x.to(torch.float64),
    "norm": lambda x: torch.linalg.vector_norm(x.float()),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool)
INDICES: list[Any] = [0, -1, slice(None), slice(1, None), slice(None, None, 2), None, ..., (..., 0), (None, 0), 7]
INDICES += [torch.tensor([0, 0]), (slice(None), 0), torch.tensor(0)]

shapes = st.sampled_from([(), (1,), (3,), (2, 3), (3, 3), (3, 1), (1, 3), (2, 1, 3), (0, 3)])


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(draw(st.sampled_from(DTYPES)))


operands = st.one_of(tensors(), st.integers(-3, 3), st.floats(-3, 3, width=32), st.booleans())
many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def outcome(work: Callable[[], Any]) -> Any:
    """What it gives, fetched, or the type of what it raises."""
    try:
        return here(work())
    except Exception as error:
        return type(error)


def here(value: Any) -> Any:
    if isinstance(value, RemoteTensor):
        return value.to_here()
    if isinstance(value, list | tuple):
        return tuple(here(entry) for entry in value)
    return value


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), found
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    elif isinstance(wanted, tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(wanted) and (found == wanted or found != found), (found, wanted)


@many
@given(name=st.sampled_from(BINARY), x=tensors(), y=operands, way=st.sampled_from(["remote", "local", "reversed"]))
def test_binary_operators(served: Served, name: str, x: torch.Tensor, y: Any, way: str) -> None:
    work = getattr(operator, name)
    remote = to_worker(x, "one")
    other = to_worker(y, "two") if way == "remote" and isinstance(y, torch.Tensor) else y
    if way == "reversed":
        assert_same(outcome(lambda: work(other, remote)), outcome(lambda: work(y, x)))
    else:
        assert_same(outcome(lambda: work(remote, other)), outcome(lambda: work(x, y)))


@many
@given(name=st.sampled_from(sorted(UNARY)), x=tensors())
def test_unary_operators_and_functions(served: Served, name: str, x: torch.Tensor) -> None:
    remote = to_worker(x, "one")
    assert_same(outcome(lambda: UNARY[name](remote)), outcome(lambda: UNARY[name](x)))


@many
@given(index=st.sampled_from(range(len(INDICES))), x=tensors())
def test_indices(served: Served, index: int, x: torch.Tensor) -> None:
    remote = to_worker(x, "one")
    assert_same(outcome(lambda: remote[INDICES[index]]), outcome(lambda: x[INDICES[index]]))


@many
@given(index=st.sampled_from(range(len(INDICES))), x=tensors(), value=st.integers(-3, 3))
def test_items_are_set(served: Served, index: int, x: torch.Tensor, value: int) -> None:
    def change(target: Any) -> Any:
        target[INDICES[index]] = value
        return target

    remote = to_worker(x, "one")
    assert_same(outcome(lambda: change(remote)), outcome(lambda: change(x)))


def test_a_chain_of_everything(served: Served) -> None:
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    y = to_worker(x, "one")
    assert_same(here((1 - y * 2 + y @ -y)[1:, ::2].T), (1 - x * 2 + x @ -x)[1:, ::2].T)
    assert len(y) == 3 and y.ndim == 2 and not y.requires_grad and y.dtype == torch.float32
    for one, other in zip(y, x, strict=True):
        assert_same(one.to_here(), other)
    values, places = y.topk(2, dim=0)
    assert_same((values.to_here(), places.to_here()), tuple(x.topk(2, dim=0)))
    assert_same(y.max(dim=1).indices.to_here(), x.max(dim=1).indices)


def test_changes_in_place(served: Served) -> None:
    x = torch.ones(4)
    y = to_worker(x, "one")
    part = y[:2]
    y += 1
    y.mul_(3)
    assert y.to_here().tolist() == [6] * 4
    assert part.to_here().tolist() == [6, 6]  # a slice is a view there, too
    assert x.tolist() == [1] * 4


def test_errors_are_of_the_same_type_with_the_remote_traceback(served: Served) -> None:
    y = to_worker(torch.ones(2, 3), "one")
    wrong = y @ y
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as raised:
        wrong.to_here()
    assert "Traceback" in raised.value.remote_traceback and "remote/owner" in raised.value.remote_traceback
    assert any("on the worker" in note for note in raised.value.__notes__)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # what is made of it has failed, too
        (wrong + 1).sum().to_worker("two").to_here()
    with pytest.raises(IndexError):
        y[5].to_here()
    with pytest.raises(TypeError):
        bool_of = y.sum(nothing=1)
        bool_of.to_here()


def test_only_listed_operators_run(served: Served) -> None:
    y = to_worker(torch.ones(2), "one")
    for name in ("apply_", "map_", "numpy", "register_hook", "storage", "data_ptr", "share_memory_", "set_"):
        with pytest.raises(AttributeError, match="fetch"):
            getattr(y, name)
    with pytest.raises(TypeError, match="runs on no worker"):
        torch.bernoulli(y)  # type: ignore[call-overload]
    assert name_of(torch.load) is None and name_of(torch.save) is None and name_of(eval) is None
    assert not [name for name in OPERATORS if "load" in name or "save" in name or "file" in name]
    with pytest.raises((AttributeError, WorkerFailed)):
        y.handle.peer.ask("op", {"op": "os.system", "a": ["l", ["t", "true"], ["m"]], "out": 1 << 40}).result()


def test_what_does_not_travel_is_said_at_once(served: Served) -> None:
    y = to_worker(torch.ones(2), "one")
    with pytest.raises(TypeError, match="does not travel"):
        y.sum(dim=lambda: 0)
    with pytest.raises(TypeError, match="does not travel"):
        y + object()
    with pytest.raises(Exception, match="does not travel"):
        y + torch.ones(2, dtype=torch.complex64)
