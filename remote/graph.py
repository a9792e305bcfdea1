"""Gradients through workers: every remote call is a node of the caller's own autograd graph, on a tensor of no content.

So torch's engine decides the order of the way back, whatever is local and whatever is remote in it; a node's way back
is a call to its worker, and gradients pass from worker to worker as results do.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.autograd import Function

from .peer import Handle, Peer, Pending
from .values import Ref, leaves, opened, pack

if TYPE_CHECKING:
    from .tensor import RemoteTensor

LOCAL: Final = object()  # an input that is a tensor of this process
_engine: Any = torch.autograd.Variable._execution_engine
_C: Any = torch._C


def content_free() -> torch.Tensor:
    """A tensor that stands in the local graph for a remote one."""
    return torch.zeros((), requires_grad=True)


class Slot:
    """Where the gradients of one remote value gather.

    Attributes:
        leaf: the value itself, where its gradient stays with it: a parameter, or a tensor that was made a leaf.
    """

    __slots__ = ("_grads", "leaf", "root")

    def __init__(self, leaf: Handle | None = None) -> None:
        self.leaf = leaf
        self.root = False
        self._grads: list[Any] = []

    def add(self, grads: Any) -> None:
        """Takes a gradient: a handle of one, or a list with an entry for each tensor of the value."""
        if self.leaf is None:
            self._grads.append(grads)
            return
        tensors: list[Any] = []
        keeps: list[Handle] = []
        peer = self.leaf.peer
        packed = _packed([grads], tensors, peer, keeps)
        passing().append(peer.ask("accumulate", {"of": self.leaf.number, "a": packed}, tensors, [*keeps, self.leaf]))

    def take(self) -> list[Any]:
        found, self._grads = self._grads, []
        return found


class Record:
    """A remote call that gradients can go back through.

    Args:
        number: its result's, by which its worker knows it.
        inputs: of each handle, and each tensor that requires grad, among its arguments: its slot, LOCAL or None.
    """

    def __init__(self, peer: Peer, number: int, slot: Slot, inputs: list[Any]) -> None:
        self.peer = peer
        self.number = number
        self.slot = slot
        self.inputs = inputs
        self._forget = weakref.finalize(self, peer.forgotten.append, number)
        self._forget.atexit = False

    def back(self, *, retain: bool = False, tag: str = "") -> tuple[Pending, list[Handle | None]]:
        """Asks for the way back, from the gradients in its slot; those of its inputs go into theirs.

        Returns:
            The call, in whose answer the local inputs' gradients are, and the handles of the others.
        """
        peer = self.peer
        handles = [peer.handle() if isinstance(given, Slot) else None for given in self.inputs]
        wants = [
            handle.number if handle is not None else -1 if given is LOCAL else 0
            for handle, given in zip(handles, self.inputs, strict=True)
        ]
        tensors: list[Any] = []
        keeps: list[Handle] = []
        grads = self.slot.take()
        fields = {"node": self.number, "wants": wants, "root": self.slot.root, "retain": retain, "tag": tag}
        fields["a"] = _packed(grads, tensors, peer, keeps)
        self.slot.root = False
        pending = peer.ask("back", fields, tensors, keeps)
        if not retain:
            self._forget.detach()
        for handle, given in zip(handles, self.inputs, strict=True):
            if handle is not None:
                given.add(handle)
        return pending, handles


def _packed(grads: list[Any], tensors: list[Any], reader: Peer, keeps: list[Handle]) -> Any:
    def other(value: Any) -> Ref | None:
        found = value if isinstance(value, Handle) else getattr(value, "handle", None)
        if not isinstance(found, Handle):
            return None
        if found.peer is not reader:
            keeps.append(found)
        return found.ref(reader)

    return pack(grads, tensors, other)


class _Passes(threading.local):
    task = -1
    pending: list[Pending] | None = None
    held: list[Pending] | None = None  # takes what is under way at the end, in place of a wait


_passes: Final = _Passes()


def passing() -> list[Pending]:
    """The calls of the way back that is under way in this thread; it ends when all of them have ended."""
    current = task()
    if _passes.pending is None or _passes.task != current:
        _passes.task, _passes.pending = current, []
        if current != -1:
            _engine.queue_callback(_finish)
    return _passes.pending


def task() -> int:
    """The backward pass that is under way in this thread; -1 where none is."""
    return int(_C._current_graph_task_id())


def at_the_end(action: Callable[[], None]) -> None:
    """Within a backward pass: calls `action` once all of its calls are under way."""
    _engine.queue_callback(action)


def _finish() -> None:
    pending, _passes.pending = _passes.pending, None
    if _passes.held is not None:
        _passes.held.extend(pending or ())
        return
    for call in pending or ():
        call.result()


class _Call(Function):
    """Stands for a remote call: its inputs stand for the call's, local ones are themselves."""

    @staticmethod
    def forward(ctx: Any, record: Record, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.given = len(inputs)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        record: Record = ctx.record
        calls = passing()
        pending, _ = record.back(retain=_C._autograd._get_current_graph_task_keep_graph())
        calls.append(pending)
        if not record.inputs or all(given is None for given in record.inputs):
            return None, *[None] * ctx.given
        here = iter(opened(*pending.result()) if LOCAL in record.inputs else ())
        found = [next(here) if given is LOCAL else torch.zeros(()) for given in record.inputs if given is not None]
        return None, *found


class _ToHere(Function):
    """The tensors of a remote value, here."""

    @staticmethod
    def forward(ctx: Any, slot: Slot, token: torch.Tensor, *values: torch.Tensor) -> Any:
        ctx.slot = slot
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[value for value in values if not value.is_floating_point()])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        ctx.slot.add([None if grad is None else grad.detach().clone() for grad in grads])
        return None, torch.zeros(()), *[None] * len(grads)


def recorded(record: Record, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The tensor that stands for the call's result; `inputs` those that stand for its inputs, None left out."""
    token: torch.Tensor = _Call.apply(record, *(inputs or [content_free()]))
    return token


def fetched(slot: Slot, token: torch.Tensor, value: Any) -> Any:
    """A value that was fetched, as a part of the local graph."""
    found = leaves(value)
    if not found:
        return value
    tensors = iter(_ToHere.apply(slot, token, *found))
    return _refilled(value, tensors)


def _refilled(value: Any, tensors: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, list | tuple):
        return type(value)([_refilled(entry, tensors) for entry in value])
    if isinstance(value, dict):
        return {name: _refilled(entry, tensors) for name, entry in value.items()}
    return value


@contextmanager
def without_waiting(held: list[Pending]) -> Iterator[None]:
    """Ways back that begin within do not wait for their end: their calls are added to `held`."""
    _passes.held = held
    try:
        yield
    finally:
        _passes.held = None


def backward(tensor: "RemoteTensor", gradient: Any, retain: bool) -> None:
    """Gradients of all that a remote tensor was made of; returns when they are there.

    Raises:
        RuntimeError: it was not made of anything that requires grad.
    """
    if tensor.token is None:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    if tensor.slot.leaf is not None:
        tensor.slot.add([torch.ones(tensor.shape) if gradient is None else gradient])
        _finish()
        return
    if gradient is None:
        tensor.slot.root = True
    else:
        tensor.slot.add([gradient])
    torch.autograd.backward(tensor.token, retain_graph=retain)
