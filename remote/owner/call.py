"""One call as it came: its fields, its arguments as torch sees them, and what gradients need to know of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...schema.errors import Malformed
from ...schema.tensor import Tensor
from ..values import Ref, leaves, mapped, received, unpack
from .table import Table

Key = tuple[bytes, int]  # session at the owner, number there


@dataclass(slots=True)
class Call:
    """What one message asks.

    Attributes:
        body: verb `v`, result's number `out`, arguments `a`, whether gradients are wanted `grad`, and the verb's own.
        pulled: values of other workers among the arguments, or what kept them from coming.
        missing: how many of them are still to come.
        inputs: of each handle, and each tensor that requires grad, among the arguments, the leaves of its tensors.
        kind: calls of one kind take about equally long.
    """

    body: dict[str, Any]
    tensors: Sequence[Tensor]
    table: Table
    device: torch.device
    pulled: dict[Key, Any] = field(default_factory=dict)
    missing: int = 0
    inputs: list[list[torch.Tensor]] = field(default_factory=list)
    kind: Hashable = None

    @property
    def out(self) -> int:
        return self.number("out", 0)

    def number(self, name: str, default: int | None = None) -> int:
        found = self.body.get(name, default)
        if type(found) is not int:
            raise Malformed(f"a call without a number `{name}`")
        return found

    def text(self, name: str) -> str:
        found = self.body.get(name)
        if type(found) is not str:
            raise Malformed(f"a call without a text `{name}`")
        return found

    def numbers(self, name: str) -> list[int]:
        found = self.body.get(name, [])
        if type(found) is not list or any(type(entry) is not int for entry in found):
            raise Malformed(f"a call whose `{name}` is no list of numbers")
        return found

    def values(self, *, grad: bool = False) -> Any:
        """The arguments. With `grad` each of their tensors that requires grad is a leaf of its own, noted in `inputs`.

        Raises:
            Exception: what the call raised that should have made one of them.
        """

        def tensor(index: int, requires: bool) -> torch.Tensor:
            found = received(self.tensors, index, self.device)
            if requires and grad:
                self.inputs.append([found.requires_grad_()])
            return found

        def handle(ref: Ref) -> Any:
            if ref.service:
                found = self.pulled[ref.session, ref.number]
                if isinstance(found, Exception):
                    raise found
                found = mapped(found, lambda tensor: tensor.to(self.device))
            else:
                found = self.table.value(ref.number)
            if not grad:
                return found
            cut = mapped(found, _cut)
            self.inputs.append(leaves(cut))
            return cut

        return unpack(self.body.get("a"), tensor, handle)


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor
