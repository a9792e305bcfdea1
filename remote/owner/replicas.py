"""Gradients and weights of equal modules, summed over their workers: each takes its part of them. Knows no caller.

First every worker lays its gradients out as parts (one for each replica), then replica j adds up part j of all in the
order of the replicas, and then every worker takes all sums: 2 (R - 1) / R of the size come to each worker, and all get
the same bits. Of two replicas, and where there is little, each lays them out as one, and everyone adds up all: that is
no more, or matters less than the step that it saves.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from ...schema.errors import Malformed
from .call import Call
from .compute import Answer
from .models import module_of

LARGEST: Final = 16 << 20  # elements of what is laid out at a time
FEW: Final = 1 << 16  # elements that everyone adds up


def bunches(sizes: list[int]) -> list[tuple[int, int]]:
    """First and last (exclusive) of runs of tensors that together have at most LARGEST elements, or are one."""
    found: list[tuple[int, int]] = []
    begin = total = 0
    for place, size in enumerate(sizes):
        if place > begin and total + size > LARGEST:
            found.append((begin, place))
            begin, total = place, 0
        total += size
    return [*found, (begin, len(sizes))] if begin < len(sizes) else found


def parts_of(size: int, replicas: int) -> int:
    """In how many parts so many elements are added up."""
    return 1 if replicas == 2 or size <= FEW else replicas


def _chosen(call: Call) -> tuple[list[torch.Tensor], bool]:
    """A run of the module's tensors: parameters that train, or, of `weights`, all parameters and buffers."""
    module, weights = module_of(call), bool(call.body.get("weights"))
    trained: list[torch.Tensor] = [found for found in module.parameters() if found.requires_grad]
    return (tensors_of(module) if weights else trained)[call.number("first") : call.number("last")], weights


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _sizes(call: Call) -> Answer:
    module = module_of(call)
    parameters = [[name, found.numel()] for name, found in module.named_parameters()]
    shapes = [list(found.shape) for found in tensors_of(module)]
    return {"parameters": parameters, "all": [found.numel() for found in tensors_of(module)], "shapes": shapes}, []


def _lay(call: Call) -> Answer:
    """Each part as a pair of values: a vector, and for each tensor of the run 1 where it has a gradient."""
    chosen, weights = _chosen(call)
    outs = call.numbers("wants")
    if weights:
        for tensor, out in zip(chosen, outs, strict=True):
            call.table.set(out, tensor.detach())
        return {}, []
    there = torch.tensor([float(found.grad is not None) for found in chosen])
    wide = torch.float64 if any(found.dtype == torch.float64 for found in chosen) else torch.float32
    grads = [torch.zeros_like(found) if found.grad is None else found.grad for found in chosen]
    flat = torch.cat([grad.detach().reshape(-1).to(call.device, wide) for grad in grads])
    for part, out in zip(flat.tensor_split(len(outs)), outs, strict=True):
        call.table.set(out, [part if len(outs) == 1 else part.clone(), there])
    return {}, []


def _mean(call: Call) -> Answer:
    """Of the parts of all replicas, in their order."""
    (parts,) = call.values()
    call.table.set(call.out, _mean_of(parts))
    return {}, []


def _mean_of(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    total, there = parts[0]
    for part, also in parts[1:]:
        total, there = total + part, there + also.to(there.device)
    return [total / len(parts), there]


def _take(call: Call) -> Answer:
    """Means of all parts, or of the gradients of all if `whole`, become the gradients; or values the `weights`."""
    (parts,) = call.values()
    chosen, weights = _chosen(call)
    with torch.no_grad():
        if weights:
            for tensor, value in zip(chosen, parts, strict=True):
                tensor.copy_(value)
            return {}, []
        if call.body.get("whole"):
            parts = [_mean_of(parts)]
        flat, there = torch.cat([part for part, _ in parts]), parts[0][1].tolist()
        if len(flat) != sum(found.numel() for found in chosen) or len(there) != len(chosen):
            raise Malformed("gradients of another module")
        begin = 0
        for tensor, some in zip(chosen, there, strict=True):
            values = flat[begin : begin + tensor.numel()].view(tensor.shape)
            begin += tensor.numel()
            tensor.grad = values.to(tensor.device, tensor.dtype, copy=True) if some else None
    return {}, []


VERBS: Final[dict[str, Callable[[Call], Answer]]] = {"sizes": _sizes, "lay": _lay, "mean": _mean, "take": _take}
