"""Operators, calls of modules and the way back through them, in the compute thread. Knows torch, no message.

Gradients: every call is cut off from those before it, so that the way back is a call, too, and the caller, who knows
which call used which result, decides their order. The gradient of a value is a list with one entry for each of its
tensors, None where there is none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..failures import raised
from ..operators import IN_PLACE, OPERATORS
from ..values import leaves, mapped, pack
from .call import Call
from .table import Failed, Node

Answer = tuple[dict[str, Any], list[Any]]
Grads = list[torch.Tensor | None]
PLAIN = (bool, int, float, str)
GROWING = frozenset(["operator.lshift", "operator.mod", "operator.mul", "operator.pow"])


def described(value: Any) -> list[Any]:
    """What the caller is told of a value: its kind, and what of it can be known without fetching it."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return ["x", dtype, list(value.shape), str(value.device), value.requires_grad]
    if isinstance(value, torch.Size):
        return ["v", list(value)]
    if isinstance(value, list | tuple):
        if all(type(entry) in PLAIN or _listed(entry) for entry in value):
            return ["v", list(value)]
        return ["t", len(value), _fields(value)]
    if isinstance(value, dict):
        return ["m", [str(key) for key in value]]
    if value is None or type(value) in PLAIN:
        return ["v", value]
    return ["?", type(value).__name__]


def _listed(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) in PLAIN or _listed(entry) for entry in value)


def _fields(value: Any) -> list[str]:
    """Names of a named tuple's entries; torch's own result types have no list of them."""
    if hasattr(value, "_fields"):
        return list(value._fields)
    if type(value).__module__ != "torch.return_types":
        return []
    names = [name for name in dir(value) if not name.startswith(("_", "n_")) and name not in ("count", "index")]
    return [next(name for name in names if getattr(value, name) is entry) for entry in value]


def operate(call: Call) -> Answer:
    """Runs an operator of the list."""
    name = call.text("op")
    function = OPERATORS.get(name)
    if function is None:
        raise AttributeError(f"{name[:200]} runs on no worker: fetch the tensor with to_here()")
    if name in GROWING:
        function = _of_tensors(name, function)
    return _run(call, _out_of_place(call, function) if name in IN_PLACE and call.body.get("grad") else function)


def _of_tensors(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        if not leaves(args):  # a power of two whole numbers may take all memory, and no thread runs until it ends
            raise TypeError(f"{name} of plain values runs on no worker: fetch them with to_here()")
        return function(*args)

    return checked


def forward(call: Call) -> Answer:
    """Calls a module."""
    module = call.table.value(call.number("module"))
    if not isinstance(module, nn.Module):
        raise TypeError("what is called is no module")
    place = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)

    def placed(*args: Any, **kwargs: Any) -> Any:
        """What came from elsewhere lies on the worker's own device; the module may be on another."""
        if place is not None:
            args, kwargs = mapped((args, kwargs), lambda tensor: tensor.to(place))
        return module(*args, **kwargs)

    return _run(call, placed)


def _run(call: Call, function: Callable[..., Any]) -> Answer:
    grad = bool(call.body.get("grad"))
    args, kwargs = call.values(grad=grad)
    if "out" in kwargs:
        raise TypeError("out= does not travel: use the result")
    if grad:
        with torch.enable_grad():
            value = function(*args, **kwargs)
        call.table.nodes[call.out] = Node(leaves(value), call.inputs, call.kind)
    else:
        with torch.no_grad():
            value = function(*args, **kwargs)
    told = described(value)
    if told[0] == "?":
        raise TypeError(f"the result, a {told[1]}, does not stay on a worker: it must be made of tensors")
    call.table.set(call.out, value)
    if call.body.get("tag"):
        call.table.ran.append(call.text("tag"))
    return {"is": told}, []


def _out_of_place(call: Call, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same on a copy: what came before needs the old value. The caller puts the result in its place."""

    def change(target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if call.table.shares(target, call.number("target", 0)):
            raise RuntimeError(
                "a tensor that shares its memory with another cannot be changed in place while gradients are "
                "recorded: use the operator without the underscore"
            )
        return function(target.clone(), *args, **kwargs)

    return change


def back(call: Call) -> Answer:
    """From the gradients of a call's result to those of its arguments; its module's parameters get theirs."""
    number = call.number("node")
    node = call.table.nodes.get(number)
    if node is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time (or a call that was made without gradients): "
            "specify retain_graph=True the first time"
        )
    if isinstance(node, Failed):
        raise raised(node.said)
    retain = bool(call.body.get("retain"))
    if not retain:
        del call.table.nodes[number]
    grads = _summed(call.values(), len(node.outputs))
    root = bool(call.body.get("root"))
    if root and not any(output.requires_grad for output in node.outputs):
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    pairs = [
        (output, None if grad is None else grad.to(output.device))
        for output, grad in zip(node.outputs, grads, strict=True)
        if output.requires_grad and (root or grad is not None)
    ]
    # a pass that is after other gradients leaves those of the module alone
    leaves_here = [leaf for found in node.inputs for leaf in found if leaf.requires_grad]
    ends = None if call.body.get("own", True) else leaves_here
    if pairs and ends != []:
        outputs, given = zip(*pairs, strict=True)
        torch.autograd.backward(outputs, given, retain_graph=retain, inputs=ends)
    here: list[torch.Tensor] = []
    for want, found in zip(call.numbers("wants"), node.inputs, strict=True):
        grads = [_taken(leaf) for leaf in found]
        if want > 0:
            call.table.set(want, grads)
        elif want < 0:
            here.extend(
                torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(found, grads, strict=True)
            )
    if call.body.get("tag"):
        call.table.ran.append(call.text("tag"))
    tensors: list[Any] = []
    return {"a": pack(here, tensors)}, tensors


def _taken(leaf: torch.Tensor) -> torch.Tensor | None:
    if not leaf.requires_grad:
        return None  # it stands for itself, and its gradient is its own
    grad, leaf.grad = leaf.grad, None
    return grad


def _summed(contributions: list[Any], count: int) -> Grads:
    total: Grads = [None] * count
    for contribution in contributions:
        if len(contribution) != count:
            raise RuntimeError(f"gradients of {len(contribution)} tensors for a result of {count}")
        for place, grad in enumerate(contribution):
            if grad is not None:
                own = total[place]
                total[place] = grad if own is None else own + grad.to(own.device)
    return total


def accumulate(call: Call) -> Answer:
    """Adds to the gradient of a leaf or a parameter that the caller used by itself."""
    leaf = call.table.value(call.number("of"))
    (grad,) = _summed(call.values(), 1)
    if grad is not None and leaf.requires_grad:
        leaf.grad = grad.to(leaf.device) if leaf.grad is None else leaf.grad + grad.to(leaf.device)
    return {}, []


def gradient(call: Call) -> Answer:
    """The gradient of a leaf as a value of its own, or that there is none."""
    found = call.table.value(call.number("of")).grad
    call.table.set(call.out, found)
    return {"is": described(found)}, []


def no_gradient(call: Call) -> Answer:
    call.table.value(call.number("of")).grad = None
    return {}, []


def require(call: Call) -> Answer:
    """Makes a value a leaf that requires grad, or one that does not."""
    value = call.table.value(call.number("of"))
    flag = bool(call.body.get("flag"))
    if flag and value.requires_grad and not value.is_leaf:
        return {"is": described(value)}, []
    value.requires_grad_(flag)
    return {"is": described(value)}, []


def fetch(call: Call) -> Answer:
    """A value, to the caller."""
    tensors: list[Any] = []
    value = call.table.value(call.number("of"))
    return {"a": pack(value, tensors)}, tensors


def executed(call: Call) -> Answer:
    """The tags of calls in the order in which they ran here; forgets them."""
    ran, call.table.ran = call.table.ran, []
    return {"ran": ran}, []


def fail(call: Call) -> Answer:
    """A call that could not travel, and whose place in the order this takes."""
    raise raised(call.body.get("said"))


VERBS: dict[str, Callable[[Call], Answer]] = {
    "op": operate,
    "call": forward,
    "back": back,
    "accumulate": accumulate,
    "gradient": gradient,
    "no_gradient": no_gradient,
    "require": require,
    "fetch": fetch,
    "executed": executed,
    "fail": fail,
    "free": lambda call: ({}, []),
}
