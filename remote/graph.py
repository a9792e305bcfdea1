"""Gradients through workers: every remote call is a node of the caller's own autograd graph, on a tensor of no content.

So torch's engine decides the order of the way back, whatever is local and whatever is remote in it; a node's way back
is a call to its worker, and gradients pass from worker to worker as results do.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch.autograd import Function

from .peer import Handle, Peer, Pending
from .values import Ref, leaves, opened, pack

LOCAL: Final = object()  # an input that is a tensor of this process
_engine: Any = torch.autograd.Variable._execution_engine
_C: Any = torch._C


def content_free() -> torch.Tensor:
    """A tensor that stands in the local graph for a remote one."""
    return torch.zeros((), requires_grad=True)


class Slot:
    """Where the gradients of one remote value gather.

    Those of each backward pass gather apart: one that failed leaves nothing to the next, and threads do not mix.

    Attributes:
        leaf: the value itself, where its gradient stays with it: a parameter, or a tensor that was made a leaf.
        root: the gradient that a pass begins with here is 1.
    """

    __slots__ = ("_grads", "leaf", "root")

    def __init__(self, leaf: Handle | None = None) -> None:
        self.leaf = leaf
        self.root = False
        self._grads: dict[int, list[Any]] = {}  # by pass; -1 for those that a pass begins with

    def begin(self, gradient: Any = None) -> None:
        """A pass begins here, with this gradient, or with 1."""
        self.root = gradient is None
        self._grads[-1] = [] if gradient is None else [[gradient]]

    def add(self, grads: Any) -> None:
        """Takes a gradient: a handle of one, or a list with an entry for each tensor of the value."""
        if self.leaf is None:
            self._grads.setdefault(task(), []).append(grads)
            return
        tensors: list[Any] = []
        keeps: list[Handle] = []
        peer = self.leaf.peer
        packed = _packed([grads], tensors, peer, keeps)
        passing().append(peer.ask("accumulate", {"of": self.leaf.number, "a": packed}, tensors, [*keeps, self.leaf]))

    def take(self) -> list[Any]:
        """What has gathered in this pass; outside of passes, in all."""
        if task() != -1:
            return self._grads.pop(-1, []) + self._grads.pop(task(), [])
        found = [grads for own in self._grads.values() for grads in own]
        self._grads.clear()
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

    def back(self, *, retain: bool = False, tag: str = "", unmet: Collection[int] = (), own: bool = True) -> Pending:
        """Asks for the way back, from the gradients in its slot; those of its inputs go into theirs.

        Args:
            unmet: places among `inputs` that this pass does not come to.
            own: its module's parameters get theirs.

        Returns:
            The call, in whose answer the local inputs' gradients are.
        """
        peer = self.peer
        peer.quiet(grads=True)
        handles = [
            peer.handle() if isinstance(given, Slot) and place not in unmet else None
            for place, given in enumerate(self.inputs)
        ]
        wants = [
            handle.number if handle is not None else -1 if given is LOCAL else 0
            for handle, given in zip(handles, self.inputs, strict=True)
        ]
        tensors: list[Any] = []
        keeps: list[Handle] = []
        grads = self.slot.take()
        fields = {"node": self.number, "wants": wants, "root": self.slot.root, "retain": retain, "tag": tag, "own": own}
        fields["a"] = _packed(grads, tensors, peer, keeps)
        self.slot.root = False
        pending = peer.ask("back", fields, tensors, keeps)
        if not retain:
            self._forget.detach()
        for handle, given in zip(handles, self.inputs, strict=True):
            if handle is not None:
                given.add(handle)
        return pending


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
    """Of this thread: the calls of each backward pass that is under way, one of which may be within another's."""

    def __init__(self) -> None:
        self.pending: dict[int, list[Pending]] = {}
        self.held: list[Pending] | None = None  # takes what is under way at the end, in place of a wait


_passes: Final = _Passes()
NESTED: Final = 64  # passes within each other, more than torch's engine has in one thread


def passing() -> list[Pending]:
    """The calls of the way back that is under way in this thread; it ends when all of them have ended."""
    current = task()
    if current not in _passes.pending:
        if len(_passes.pending) > NESTED:  # of passes that failed
            del _passes.pending[next(iter(_passes.pending))]
        _passes.pending[current] = []
        if current != -1:
            _engine.queue_callback(partial(_finish, current))
    return _passes.pending[current]


def task() -> int:
    """The backward pass that is under way in this thread; -1 where none is."""
    return int(_C._current_graph_task_id())


def at_the_end(action: Callable[[], None]) -> None:
    """Within a backward pass: calls `action` once all of its calls are under way."""
    _engine.queue_callback(action)


def _finish(current: int) -> None:
    pending = _passes.pending.pop(current, [])
    if _passes.held is not None:
        _passes.held.extend(pending)
        return
    for call in pending:
        call.result()


def _refuse_twice() -> None:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("gradients of gradients do not go through workers: leave out create_graph=True")


class _Call(Function):
    """Stands for a remote call: its inputs stand for the call's, local ones are themselves, a last one for its module's
    parameters."""

    @staticmethod
    def forward(ctx: Any, record: Record, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.given = len(inputs)
        ctx.devices = [given.device for given in inputs]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _refuse_twice()
        record: Record = ctx.record
        calls = passing()
        places = [place for place, given in enumerate(record.inputs) if given is not None]
        behind = [node for node, _ in ctx.next_functions][-ctx.given :]
        unmet = {
            place
            for place, node in zip(places, behind, strict=False)
            if record.inputs[place] is not LOCAL and not _C._will_engine_execute_node(node)
        }
        own = len(places) == ctx.given or _C._will_engine_execute_node(behind[-1])
        pending = record.back(retain=_C._autograd._get_current_graph_task_keep_graph(), unmet=unmet, own=own)
        calls.append(pending)
        here = iter(opened(*pending.result()) if LOCAL in record.inputs else ())
        found: list[torch.Tensor | None] = [
            next(here).to(ctx.devices[order]) if record.inputs[place] is LOCAL else torch.zeros(())
            for order, place in enumerate(places)
        ]
        return None, *found, *[None] * (ctx.given - len(found))


class _ToHere(Function):
    """The tensors of a remote value, here."""

    @staticmethod
    def forward(ctx: Any, slot: Slot, token: torch.Tensor, values: list[torch.Tensor]) -> Any:
        ctx.slot = slot
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[value for value in values if not value.is_floating_point()])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        _refuse_twice()
        ctx.slot.add([None if grad is None else grad.detach().clone() for grad in grads])
        return None, torch.zeros(()), None


def recorded(record: Record, inputs: list[torch.Tensor], trainable: bool) -> torch.Tensor:
    """The tensor that stands for the call's result; `inputs` those that stand for its inputs, None left out.

    Args:
        trainable: its module's parameters may get gradients.
    """
    token: torch.Tensor = _Call.apply(record, *inputs, *([content_free()] if trainable else []))
    return token


def fetched(slot: Slot, token: torch.Tensor, value: Any) -> Any:
    """A value that was fetched, as a part of the local graph."""
    found = leaves(value)
    if not found:
        return value
    tensors = iter(_ToHere.apply(slot, token, found))  # in a list: what is no input of it may be changed in place
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


def backward(
    slot: Slot, token: torch.Tensor | None, ones: Callable[[], torch.Tensor], gradient: Any, retain: bool
) -> None:
    """Gradients of all that a remote value was made of; returns when they are there.

    Args:
        token: the tensor that stands for it; None where gradients go nowhere.
        ones: makes the gradient of a scalar that is a leaf itself.

    Raises:
        RuntimeError: it was not made of anything that requires grad.
    """
    if token is None:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    if slot.leaf is not None:
        slot.add([ones() if gradient is None else gradient])
        _finish(task())
        return
    slot.begin(gradient)
    torch.autograd.backward(token, retain_graph=retain)
