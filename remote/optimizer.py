"""One optimizer over modules on several workers: each steps where its parameters are. Knows no message."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from ..schema.errors import Refused
from .chunks import Piece
from .owner.optimizers import KINDS
from .peer import Handle, Pending
from .proxy import RemoteModule, Several, downloaded, uploaded
from .tensor import RemoteTensor
from .values import pack

GROUPS: Final = "an optimizer has one group here: make one RemoteOptimizer for each group of modules on workers"
EPSILON: Final = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class RemoteOptimizer(torch.optim.Optimizer):
    """An optimizer in all respects but that its parameters are elsewhere: torch's schedules take it as one.

    Args:
        kind: sgd or adamw.
        proxies: modules on any workers, as a list; models of `from_pretrained`, DataParallel.
        options: of the class of torch of that name.

    Raises:
        Refused: no such optimizer, or nothing to optimize.
    """

    def __init__(self, kind: str, proxies: Sequence[RemoteModule | Several], lr: float, **options: Any) -> None:
        if kind not in KINDS:
            raise Refused(f"there is no optimizer {kind}: use {' or '.join(KINDS)}")
        if any(isinstance(value, torch.Tensor) for value in (lr, *options.values())):
            raise Refused("settings of an optimizer are numbers here, not tensors: give lr.item()")
        stand_in = torch.zeros(1, requires_grad=True)
        make: Any = KINDS[kind]
        known = inspect.signature(make).parameters
        defaults = make([stand_in], lr=lr, **options).defaults
        super().__init__([stand_in], {name: value for name, value in defaults.items() if name in known})
        self._modules = list(_told_apart(proxies))
        self._there: list[Handle] = []
        made = []
        for peer in dict.fromkeys(module.proxy.peer for module in self._modules):
            handle = peer.handle()
            self._there.append(handle)
            fields = {"kind": kind, "out": handle.number, "a": pack([(), self._options()], [])}
            made.append(peer.ask("optimizer", {**fields, **self._of(handle)}))
        for pending in made:
            pending.result()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The one group that there is; another is refused: make one more optimizer."""
        if self.param_groups:
            raise Refused(GROUPS)
        super().add_param_group(param_group)

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
            if not set_to_none:
                handle.peer.quiet(grads=True)
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
        squares += sum(answer["squares"] for answer in self._all("norm", first=True))
        norm = math.sqrt(squares)
        factor = float(max_norm) / (norm + EPSILON)
        if factor < 1:
            for handle in self._there:
                handle.peer.quiet(grads=True)
            self._all("scale", factor=factor)
            for grad in own:
                grad.mul_(factor)
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """What all workers keep of their parameters, gathered here, and the settings.

        Returns:
            `state`: name of a parameter and of what is kept (0.weight.exp_avg: of the first proxy's weight) to tensor,
            of replicas once; `param_groups`: as torch has them, without parameters.
        """
        state: dict[str, torch.Tensor] = {}
        for handle in self._there:
            held = handle.peer.handle()
            fields = {"of": handle.number, "out": held.number, **self._of(handle, first=True)}
            told = handle.peer.ask("kept", fields).result()[0]
            state |= downloaded(told, partial(_piece, held))
        return {"state": state, "param_groups": [self._options()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of an optimizer over modules of the same order, on whatever workers.

        Raises:
            Refused: it is of other parameters.
        """
        if len(state_dict["param_groups"]) != 1:
            raise Refused(f"the state is of {len(state_dict['param_groups'])} groups: {GROUPS}")
        (options,) = state_dict["param_groups"]
        state: dict[str, torch.Tensor] = state_dict["state"]
        prefixes = tuple(module.prefix for module in self._modules)
        unknown = next((name for name in state if not str(name).startswith(prefixes)), None)
        if unknown is not None:
            raise Refused(f"the state is of other parameters: there is no {unknown}")
        for handle in self._there:
            own = self._of(handle)
            names = [name for name in state if name.startswith(tuple(own["prefixes"]))]
            staging = uploaded(handle.peer, [state[name] for name in names])
            handle.peer.quiet()
            fields = {"of": handle.number, "names": names, "staging": staging.number, **own}
            handle.peer.ask("keep", fields).result()
        self.param_groups[0].update({name: value for name, value in options.items() if name in self.defaults})

    # -- inside

    def _of(self, handle: Handle, first: bool = False) -> dict[str, Any]:
        """The modules that an optimizer steps; of replicas only where the first of them is, if `first`."""
        own = [module for module in self._modules if module.proxy.peer is handle.peer and not (first and module.again)]
        modules = [module.proxy.handle.number for module in own]
        return {"modules": modules, "prefixes": [module.prefix for module in own]}

    def _options(self) -> dict[str, Any]:
        return {name: self.param_groups[0][name] for name in self.defaults}

    def _all(self, verb: str, first: bool = False, **fields: Any) -> list[dict[str, Any]]:
        under_way = [
            handle.peer.ask(verb, {"of": handle.number, **self._of(handle, first), **fields}) for handle in self._there
        ]
        return [pending.result()[0] for pending in under_way]


@dataclass(frozen=True, slots=True)
class _Module:
    """One of an optimizer's modules.

    Attributes:
        prefix: of the names of its parameters in a state.
        again: it is a replica of another one, which has the same prefix.
    """

    proxy: RemoteModule
    prefix: str
    again: bool = False


def _told_apart(proxies: Sequence[RemoteModule | Several]) -> Iterator[_Module]:
    if not isinstance(proxies, Sequence):
        raise Refused(_instead(proxies))
    if not proxies:
        raise Refused("there is nothing to optimize: give a list of modules on workers, as [module]")
    for place, given in enumerate(proxies):
        if not isinstance(given, RemoteModule | Several):
            raise Refused(_instead(given))
        if isinstance(given, RemoteModule):
            yield _Module(given, f"{place}.")
        elif given.alike:
            yield from (_Module(proxy, f"{place}.", number > 0) for number, proxy in enumerate(given.proxies))
        else:
            yield from (_Module(proxy, f"{place}.{number}.") for number, proxy in enumerate(given.proxies))


def _instead(given: Any) -> str:
    """What to give in place of this, which is no list of modules on workers."""
    kind = type(given).__name__
    if isinstance(given, RemoteModule | Several):
        return "an optimizer takes a list of modules on workers: put this one into [ ]"
    if isinstance(given, dict):
        return GROUPS
    if isinstance(given, torch.Tensor | torch.nn.Module):
        return f"a {kind} of this process is for torch's own optimizers: give modules on workers here, as [module]"
    if isinstance(given, RemoteTensor):
        return "an optimizer takes whole modules on workers, not their parameters: give [module], and freeze() some"
    return f"an optimizer takes a list of modules on workers, not a {kind}: give [module]"


def _piece(held: Handle, where: list[Piece]) -> Pending:
    return held.peer.ask("kept_piece", {"held": held.number, "where": where}, (), [held])
