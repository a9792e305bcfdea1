"""Optimizers of callers, where their parameters are. In the compute thread. Knows no message."""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import nn

from ...schema.errors import Malformed, Refused
from .call import Call
from .compute import Answer

KINDS: Final[dict[str, type[torch.optim.Optimizer]]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def make(call: Call) -> Answer:
    """An optimizer over the parameters of some modules; those that are frozen have no gradient, and so no step."""
    name = call.text("kind")
    if name not in KINDS:
        raise Refused(f"there is no optimizer {name[:80]}: use {' or '.join(KINDS)}")
    _, options = call.values()
    parameters = list(dict.fromkeys(_parameters(call)))
    if not parameters:
        raise Refused("these modules have no parameters: there is nothing to optimize")
    optimizer = KINDS[name](parameters, **options)
    call.table.set(call.out, optimizer)
    return {}, []


def _parameters(call: Call) -> Iterator[nn.Parameter]:
    for number in call.numbers("modules"):
        module = call.table.value(number)
        if not isinstance(module, nn.Module):
            raise Malformed("an optimizer of what is no module")
        yield from module.parameters()


def _optimizer(call: Call) -> torch.optim.Optimizer:
    found = call.table.value(call.number("of"))
    if not isinstance(found, torch.optim.Optimizer):
        raise Malformed("what should step is no optimizer")
    return found


def step(call: Call) -> Answer:
    """One step, with the learning rate and other settings of now."""
    optimizer = _optimizer(call)
    _, options = call.values()
    for group in optimizer.param_groups:
        group.update(options)
    optimizer.step()
    return {}, []


def zero(call: Call) -> Answer:
    _optimizer(call).zero_grad(set_to_none=bool(call.body.get("to_none", True)))
    return {}, []


def _grads(call: Call) -> list[torch.Tensor]:
    groups = _optimizer(call).param_groups
    return [found.grad for group in groups for found in group["params"] if found.grad is not None]


def norm(call: Call) -> Answer:
    """The sum of squares of all gradients here, as a float64."""
    return {"squares": sum(float(grad.double().pow(2).sum()) for grad in _grads(call))}, []


def scale(call: Call) -> Answer:
    factor = call.body.get("factor")
    if not isinstance(factor, float):
        raise Malformed("gradients are scaled by a number")
    for grad in _grads(call):
        grad.mul_(factor)
    return {}, []


VERBS: Final[dict[str, Callable[[Call], Answer]]] = {
    "optimizer": make,
    "step": step,
    "zero_all": zero,
    "norm": norm,
    "scale": scale,
}
