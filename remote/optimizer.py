"""One optimizer over modules on several workers: each steps where its parameters are. Knows no message."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch

from ..schema.errors import Refused
from .owner.optimizers import KINDS
from .peer import Handle
from .proxy import RemoteModule
from .values import pack

EPSILON: Final = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class RemoteOptimizer(torch.optim.Optimizer):
    """An optimizer in all respects but that its parameters are elsewhere: torch's schedules take it as one.

    Args:
        kind: sgd or adamw.
        proxies: modules on any workers.
        options: of the class of torch of that name.

    Raises:
        Refused: no such optimizer, or nothing to optimize.
    """

    def __init__(self, kind: str, proxies: Sequence[RemoteModule], lr: float, **options: Any) -> None:
        if kind not in KINDS:
            raise Refused(f"there is no optimizer {kind}: use {' or '.join(KINDS)}")
        stand_in = torch.zeros(1, requires_grad=True)
        make: Any = KINDS[kind]
        known = inspect.signature(make).parameters
        defaults = make([stand_in], lr=lr, **options).defaults
        super().__init__([stand_in], {name: value for name, value in defaults.items() if name in known})
        self._there: list[Handle] = []
        peers = list(dict.fromkeys(proxy.peer for proxy in proxies))
        made = []
        for peer in peers:
            handle = peer.handle()
            modules = [proxy.handle.number for proxy in proxies if proxy.peer is peer]
            fields = {"kind": kind, "modules": modules, "out": handle.number, "a": pack([(), self._options()], [])}
            made.append(peer.ask("optimizer", fields))
            self._there.append(handle)
        for pending in made:
            pending.result()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every worker, with the settings of `param_groups[0]`; returns when all have stepped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for handle in self._there:
            handle.peer.quiet()
        self._all("step", a=pack([(), self._options()], []))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for handle in self._there:
            handle.peer.ask("zero_all", {"of": handle.number, "to_none": set_to_none})

    def clip_grad_norm(self, max_norm: float, local: Iterable[torch.Tensor] = ()) -> float:
        """Scales all gradients, on all workers, so that their norm together is at most that.

        Args:
            local: parameters of this process that count, too.

        Returns:
            The norm before.
        """
        own = [parameter.grad for parameter in local if parameter.grad is not None]
        squares = sum(float(grad.double().pow(2).sum()) for grad in own)
        squares += sum(answer["squares"] for answer in self._all("norm"))
        norm = math.sqrt(squares)
        factor = float(max_norm) / (norm + EPSILON)
        if factor < 1:
            self._all("scale", factor=factor)
            for grad in own:
                grad.mul_(factor)
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def _options(self) -> dict[str, Any]:
        return {name: self.param_groups[0][name] for name in self.defaults}

    def _all(self, verb: str, **fields: Any) -> list[dict[str, Any]]:
        under_way = [handle.peer.ask(verb, {"of": handle.number, **fields}) for handle in self._there]
        return [pending.result()[0] for pending in under_way]
