"""A tensor that lies on a worker, and what can be done with it from here. Knows torch's interface, no message."""

import asyncio
import operator
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

import torch

from ..schema.errors import DeadlineExceeded
from . import graph
from .graph import LOCAL, Record, Slot
from .home import home
from .operators import IN_PLACE, METHODS, OPERATORS, SET, SEVERAL, VALUES, name_of
from .peer import LARGE, Handle, Peer, Pending
from .values import DTYPES, Ref, opened, pack

ARITHMETIC: Final = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
NO_GRAD: Final = {"Tensor.detach", "torch.detach", *VALUES}
Function = Callable[..., Any]


def launch(peer: Peer, verb: str, fields: dict[str, Any], args: Any, *, trainable: bool = False) -> "RemoteTensor":
    """A call whose result stays on the worker. Returns at once.

    Args:
        trainable: it has parameters of its own that may get gradients.

    Raises:
        TypeError, Malformed: an argument does not travel.
        WorkerLost: the worker, or that of an argument, is gone.
    """
    tensors: list[Any] = []
    keeps: list[Handle] = []
    inputs: list[Any] = []
    tokens: list[torch.Tensor] = []
    recording = torch.is_grad_enabled()

    def other(value: Any) -> Ref | None:
        if isinstance(value, RemoteTensor):
            value.check(peer)
            if value.handle.peer is not peer:
                keeps.append(value.handle)
            inputs.append(None if value.token is None else value.slot)
            if value.token is not None:
                tokens.append(value.token)
            return value.handle.ref(peer)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            inputs.append(LOCAL)
            tokens.append(value)
        return None

    packed = pack(args, tensors, other, copy=LARGE)
    grad = recording and bool(trainable or tokens) and fields.get("op") not in NO_GRAD
    handle = peer.handle()
    pending = peer.ask(verb, {**fields, "a": packed, "out": handle.number, "grad": grad}, tensors, keeps, lent=True)
    slot = Slot()
    if not grad:
        return RemoteTensor(handle, pending, slot, None)
    record = Record(peer, handle.number, slot, inputs)
    return RemoteTensor(handle, pending, slot, graph.recorded(record, tokens, trainable), record)


def to_worker(tensor: Any, worker: str, *, broker: str | None = None) -> "RemoteTensor":
    """A tensor of this process as one on a worker; gradients find their way back to it."""
    return launch(home(broker).peer(worker), "op", {"op": "value"}, [(tensor,), {}])


def _operate(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator where its first remote argument lies."""
    first = _first((args, tuple(kwargs.values())))
    assert first is not None
    if name in IN_PLACE:
        return _changed(name, args, kwargs)
    found = launch(first.handle.peer, "op", {"op": name}, [args, kwargs])
    if name in VALUES:
        return found.told()[1]
    if name in SEVERAL:
        return found.taken_apart()
    return found


def _changed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator that changes its first argument, once nobody reads it; gradients see the old one and the new."""
    target = args[0]
    if not isinstance(target, RemoteTensor):
        raise TypeError("a tensor of this process cannot be changed by a remote one: fetch that with to_here()")
    if target.slot.leaf is not None and torch.is_grad_enabled():
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    peer = target.handle.peer
    peer.quiet()
    found = launch(peer, "op", {"op": name, "target": target.handle.number}, [args, kwargs])
    target.become(found)
    return target


def _first(value: Any) -> "RemoteTensor | None":
    if isinstance(value, RemoteTensor):
        return value
    if isinstance(value, list | tuple):
        return next((found for entry in value if (found := _first(entry)) is not None), None)
    return None


class RemoteTensor:
    """A value on a worker: a tensor, or what a call returned that is made of tensors.

    Operators run where it lies and give remote tensors again; nothing is fetched but by `fetch`, `to_here`, `item` and
    what needs a plain value (`bool`, `float`, `tolist`). What went wrong on the worker is raised when a value is asked.
    """

    def __init__(
        self, handle: Handle, made: Pending, slot: Slot, token: torch.Tensor | None, record: Record | None = None
    ) -> None:
        self.handle = handle
        self.made = made
        self.slot = slot
        self.token = token
        self.record = record

    # -- what is known of it

    def told(self) -> list[Any]:
        """What its worker said of it: its kind and more; waits for its call to end."""
        self.check()
        found: list[Any] = self.made.result()[0]["is"]
        return found

    def _tensor(self, place: int) -> Any:
        found = self.told()
        if found[0] != "x":
            raise TypeError("the result of this call is no tensor but made of several: index it, or iterate")
        return found[place]

    @property
    def worker(self) -> str:
        """The name of the worker that it lies on."""
        return self.handle.peer.name

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self._tensor(1)]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._tensor(2))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where it lies on its worker."""
        return torch.device(self._tensor(3))

    @property
    def requires_grad(self) -> bool:
        return self.token is not None and bool(self._tensor(4))

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    @property
    def is_leaf(self) -> bool:
        return self.token is None or self.slot.leaf is not None

    @property
    def grad(self) -> "RemoteTensor | None":
        """The gradient of a leaf, where it lies; None where there is none."""
        if self.slot.leaf is None:
            return None
        handle = self.handle.peer.handle()
        pending = self.handle.peer.ask("gradient", {"of": self.handle.number, "out": handle.number})
        handle.of_grad = True
        return None if pending.result()[0]["is"] == ["v", None] else RemoteTensor(handle, pending, Slot(), None)

    @grad.setter
    def grad(self, value: None) -> None:
        if value is not None:
            raise TypeError("a remote gradient can be set to None alone: backward(gradient) adds one")
        self.handle.peer.ask("no_gradient", {"of": self.handle.number})

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        found = self.told()
        if found[0] == "x":
            if not found[2]:
                raise TypeError("len() of a 0-d tensor")
            return int(found[2][0])
        return int(found[1]) if found[0] == "t" else len(found[1])

    def __iter__(self) -> Iterator[Any]:
        found = self.told()
        if found[0] == "m":
            return iter(found[1])
        if found[0] == "x" and not found[2]:
            raise TypeError("iteration over a 0-d tensor")
        return iter([self[place] for place in range(len(self))])

    def taken_apart(self) -> Any:
        """A tuple of remote tensors where the call returned one, with the names that it has; else itself."""
        found = self.told()
        if found[0] != "t":
            return self
        parts = [self[place] for place in range(found[1])]
        return namedtuple("result", found[2])(*parts) if found[2] else tuple(parts)

    def __repr__(self) -> str:
        known = ""
        if self.made.future.done():
            try:
                known = f", shape={list(self.shape)}, dtype={self.dtype}" if self.told()[0] == "x" else ""
            except Exception as error:
                known = f", failed: {type(error).__name__}"
        return f"RemoteTensor(worker={self.worker!r}{known})"

    def __format__(self, form: str) -> str:
        """As torch has it: of a tensor without dimensions its value is formatted."""
        if self.told()[0] == "x" and not self.shape:
            return format(self.item(), form)
        return object.__format__(self, form)

    # -- moving it

    async def fetch(self, deadline: float | None = None) -> Any:
        """Its values, here, without a graph.

        Args:
            deadline: seconds; the connection's where not given.
        """
        self.check()
        pending = self._fetching().leave()
        seconds = self.handle.peer.home.deadline if deadline is None else deadline
        await asyncio.wait([asyncio.wrap_future(pending.future)], timeout=seconds)
        if not pending.future.done():
            raise DeadlineExceeded(f"{self.worker} did not answer within {seconds:g} s: raise the deadline")
        return opened(*pending.result())

    def to_here(self, deadline: float | None = None) -> Any:
        """Its values, here; gradients of what is made of them find their way back."""
        self.check()
        value = opened(*self._fetching().result(deadline))
        if self.token is None or not torch.is_grad_enabled():
            return value
        if self.told()[0] == "x" and not self.told()[4]:
            return value
        return graph.fetched(self.slot, self.token, value)

    def _fetching(self) -> Pending:
        return self.handle.peer.ask("fetch", {"of": self.handle.number}, keeps=[self.handle])

    def to_worker(self, worker: str) -> "RemoteTensor":
        """The same on another worker, which asks for it itself."""
        return launch(self.handle.peer.home.peer(worker), "op", {"op": "value"}, [(self,), {}])

    def tolist(self) -> Any:
        return self.detach().to_here().tolist()

    def item(self) -> Any:
        return _operate("Tensor.item", (self,), {})

    def __bool__(self) -> bool:
        return bool(_operate("bool", (self,), {}))

    def __int__(self) -> int:
        return int(_operate("int", (self,), {}))

    def __float__(self) -> float:
        return float(_operate("float", (self,), {}))

    # -- gradients

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Gradients of all that it was made of, on every worker and here; returns when they are there."""
        self.check()
        graph.backward(self.slot, self.token, self._one, gradient, retain_graph)

    def _one(self) -> torch.Tensor:
        if self.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        return torch.ones(self.shape, dtype=self.dtype)

    def requires_grad_(self, flag: bool = True) -> Self:
        """Makes it a leaf whose gradient is kept where it lies."""
        if flag and self.token is not None:
            return self
        if not flag and self.token is not None and self.slot.leaf is None:
            raise RuntimeError("you can only change requires_grad flags of leaf variables.")
        made = self.handle.peer.ask("require", {"of": self.handle.number, "flag": flag})
        made.result()
        self.made = made
        self.slot = Slot(self.handle if flag else None)
        self.token = graph.content_free() if flag else None
        return self

    def become(self, other: "RemoteTensor") -> None:
        """Takes the place of what an operator made of it."""
        self.handle, self.made = other.handle, other.made
        if other.token is not None:
            self.slot, self.token, self.record = other.slot, other.token, other.record

    def check(self, user: Peer | None = None) -> None:
        """Raises WorkerLost or ConnectionClosed where it is gone, and ValueError where `user` is of another broker."""
        peer = self.handle.peer
        if peer.error is not None:
            raise type(peer.error)(peer.error.message, worker=peer.error.worker)
        if user is not None and user.home is not peer.home:
            raise ValueError("a remote tensor of one broker cannot go to a worker of another: fetch it with to_here()")

    # -- operators

    @classmethod
    def __torch_function__(cls, function: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(function)
        if function in (torch.autograd.grad, torch.autograd.backward):
            raise TypeError("gradients of remote tensors: call loss.backward(), and read them in .grad of the leaves")
        if name is None:
            called = getattr(function, "__name__", function)
            raise TypeError(f"{called} runs on no worker: fetch the tensor with to_here()")
        return _operate(name, tuple(args), dict(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if isinstance(own := getattr(type(self), name, None), property):
            return own.__get__(self)  # it raised what its call raised there, an AttributeError: raise that
        if name not in METHODS or f"Tensor.{name}" not in OPERATORS:
            raise AttributeError(f"a remote tensor has no {name}: fetch the tensor with to_here()")

        def method(*args: Any, **kwargs: Any) -> Any:
            return _operate(f"Tensor.{name}", (self, *args), kwargs)

        return method

    def __getitem__(self, index: Any) -> "RemoteTensor":
        return _operate("operator.getitem", (self, index), {})  # type: ignore[no-any-return]

    def __setitem__(self, index: Any, value: Any) -> None:
        _changed(SET, (self, index, value), {})

    @property
    def T(self) -> "RemoteTensor":
        return _operate("Tensor.T", (self,), {})  # type: ignore[no-any-return]

    @property
    def mT(self) -> "RemoteTensor":
        return _operate("Tensor.mT", (self,), {})  # type: ignore[no-any-return]

    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy leaves operators to this class

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a remote tensor is no array: fetch it with to_here()")


def _add_operators() -> None:
    """`+`, `==` and the rest, both ways round, and `+=`."""

    def forward(name: str) -> Function:
        return lambda self, other: _operate(f"operator.{name}", (self, other), {})

    def reverse(name: str) -> Function:
        return lambda self, other: _operate(f"operator.{name}", (other, self), {})

    def single(name: str) -> Function:
        return lambda self: _operate(f"operator.{name}", (self,), {})

    def within(name: str) -> Function:
        return lambda self, other: _operate(f"Tensor.{name}_", (self, other), {})

    for name in [*ARITHMETIC, "and", "or", "xor", "lshift", "rshift"]:
        known = name if hasattr(operator, name) else f"{name}_"
        setattr(RemoteTensor, f"__{name}__", forward(known))
        setattr(RemoteTensor, f"__r{name}__", reverse(known))
    for name in ["eq", "ne", "lt", "le", "gt", "ge"]:
        setattr(RemoteTensor, f"__{name}__", forward(name))
    for name in ["neg", "pos", "abs", "invert"]:
        setattr(RemoteTensor, f"__{name}__", single(name))
    for name, method in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}.items():
        setattr(RemoteTensor, f"__i{name}__", within(method))


_add_operators()
