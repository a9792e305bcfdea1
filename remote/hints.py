"""What torch says where it is given something of a worker in place of its own. Knows torch's way to name an object."""

from typing import Any, Final

OPTIMIZED: Final = "on a worker: use ralmq.RemoteOptimizer(kind, [module], lr) with the whole module"
CHAINED: Final = (
    "on a worker: call modules one after the other, as local(remote(x)), or make them stages of ralmq.remote.Pipeline"
)


def hinted(found: Any, hint: str) -> None:
    """Has an object say what to do with it in errors of torch that name what they do not take.

    torch.typename, by which torch.optim and nn.Module name it, takes an object's own __qualname__ before its class's.
    """
    vars(found)["__qualname__"] = f"{type(found).__qualname__} ({hint})"
