"""Modules of a user's, as tests copy them to workers."""

import torch
from torch import nn


class Block(nn.Module):
    """Keeps its arguments in attributes of their names; one of them is a module."""

    def __init__(self, inner: nn.Module, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = inner
        self.width = width
        self.scale = scale
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.inner(self.norm(x))


class Odd(nn.Module):
    """Says itself what it was given; returns more than one tensor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def remote_arguments(self) -> dict[str, int]:
        return {"size": len(self.weight)}

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"double": x * 2 * self.weight, "pair": (x + 1, x.argmax(dim=-1))}


class Plain(nn.Module):
    """Has a tensor that torch does not know of."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size
        self.scale = torch.ones(size)


class Failing(nn.Module):
    """Raises what it is told to."""

    def forward(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "exit":
            raise SystemExit(3)
        raise {
            "attribute": AttributeError("no such thing"),
            "stop": StopIteration(),
            "time": TimeoutError("slow"),
            "name": NameError("undefined"),
            "file": FileNotFoundError("x.txt"),
        }[kind]


class Unlisted(nn.Module):
    """No worker is started with it."""
