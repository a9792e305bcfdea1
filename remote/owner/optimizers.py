"""Optimizers of callers, where their parameters are. In the compute thread. Knows no message."""

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import nn

from ...schema.errors import Malformed, Refused
from ..chunks import cut, sizes, specs
from .call import Call
from .compute import Answer
from .models import staging_of

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
    """The sum of squares of the gradients of some modules here, each once, as a float64."""
    parameters = dict.fromkeys(_parameters(call))
    return {"squares": sum(float(own.grad.double().pow(2).sum()) for own in parameters if own.grad is not None)}, []


def _named(call: Call) -> dict[str, nn.Parameter]:
    """Of each module the names that the caller gave it, before those of its parameters."""
    found: dict[str, nn.Parameter] = {}
    for prefix, number in zip(call.body.get("prefixes", []), call.numbers("modules"), strict=True):
        module = call.table.value(number)
        if not isinstance(module, nn.Module):
            raise Malformed("an optimizer of what is no module")
        found |= {f"{prefix}{name}": parameter for name, parameter in module.named_parameters()}
    return found


def state(call: Call) -> Answer:
    """What the optimizer keeps of each parameter, held until it is asked for in pieces."""
    kept = _optimizer(call).state
    found = {
        f"{name}.{key}": value.detach().clone()
        for name, parameter in _named(call).items()
        for key, value in kept.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }
    call.table.set(call.out, list(found.values()))
    return {"names": list(found), "specs": specs(list(found.values())), "sizes": sizes(list(found.values()))}, []


def state_piece(call: Call) -> Answer:
    digest, found = cut(call.table.value(call.number("held")), call.body.get("where", []))
    return {"sha256": digest}, found


def load_state(call: Call) -> Answer:
    """Takes what `state` gave: of each parameter all, or nothing."""
    optimizer, names = _optimizer(call), call.body.get("names")
    tensors = staging_of(call).complete()
    if not isinstance(names, list) or len(names) != len(tensors):
        raise Malformed("an optimizer's state without names")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        owner, _, key = str(name).rpartition(".")
        found.setdefault(owner, {})[key] = tensor
    known = _named(call)
    if set(found) - set(known):
        raise Refused(f"the state is of other parameters: there is no {sorted(set(found) - set(known))[0][:200]}")
    for name, parameter in known.items():
        optimizer.state.pop(parameter, None)
        if name in found:
            optimizer.state[parameter] = {
                key: value if not value.ndim else value.to(parameter.device) for key, value in found[name].items()
            }
    call.table.drop([call.number("staging")], [])
    return {}, []


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
    "kept": state,
    "kept_piece": state_piece,
    "keep": load_state,
}
