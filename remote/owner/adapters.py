"""LoRA adapters (Hu et al., 2021) on a module's linear layers, named as peft names them. Knows no caller."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...schema.errors import Refused

SEEDS = 1 << 63


class Adapted(nn.Module):
    """A linear layer that stays as it is, and what an adapter adds: B(A(dropout(x))) * alpha / r.

    Args:
        generator: of the first values of A; B begins at zero, so that nothing is added at first.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = shape_of(base)
        weight: Tensor = base.get_parameter("weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.base_layer = base
        self.scaling = alpha / r
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(columns, r, bias=False, dtype=dtype, device="meta")
        self.lora_B = nn.Linear(r, rows, bias=False, dtype=dtype, device="meta")
        first = torch.empty(r, columns, dtype=dtype)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        self.lora_A.weight = nn.Parameter(first.to(weight.device))
        self.lora_B.weight = nn.Parameter(torch.zeros(rows, r, dtype=dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        added = self.lora_B(self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype)))) * self.scaling
        total: Tensor = result + added.to(result.dtype)
        return total


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have an adapter: nn.Linear, and GPT-2's Conv1D, which is one with its weight transposed."""
    return {name: part for name, part in module.named_modules() if _is_linear(part)}


def transposed(module: nn.Module) -> bool:
    """Whether such a layer keeps its weight as [in, out]."""
    return not isinstance(module, nn.Linear)


def adapt(
    module: nn.Module,
    targets: Sequence[str],
    *,
    r: int,
    alpha: float,
    dropout: float,
    seed: int,
    whole: Callable[[str], str] = str,
) -> None:
    """Freezes a module and gives some of its linear layers an adapter each.

    Args:
        targets: names of layers.
        whole: what a layer is called in the whole model: first values depend on that name and the seed alone, so that
            they are the same however the model is split.

    Raises:
        Refused: no such layer, it has an adapter already, or numbers that make none.
    """
    known = linears(module)
    if r < 1 or not 0 <= dropout < 1:
        raise Refused(f"an adapter with r={r} and lora_dropout={dropout}: give r of at least 1 and dropout below 1")
    for name in targets:
        if name not in known or name.endswith((".base_layer", ".lora_A", ".lora_B")):
            raise Refused(f"{name[:200]} is no linear layer without an adapter")
    module.requires_grad_(False)
    for name in targets:
        digest = hashlib.sha256(f"{seed}:{whole(name)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % SEEDS)
        path, _, leaf = name.rpartition(".")
        made = Adapted(known[name], r, alpha, dropout, generator)
        setattr(module.get_submodule(path), leaf, made.train(module.training))


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__module__ == "transformers.pytorch_utils"


def shape_of(base: nn.Module) -> tuple[int, int]:
    """Out and in."""
    rows, columns = base.get_parameter("weight").shape
    return (columns, rows) if transposed(base) else (rows, columns)
