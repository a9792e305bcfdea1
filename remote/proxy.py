"""Modules on workers, as their callers have them: `remote_copy` puts one there, `built` has one made there."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import save_file
from torch import nn

from ..schema.errors import Refused
from . import chunks
from .graph import Slot, content_free
from .hints import CHAINED, OPTIMIZED, hinted
from .home import home
from .peer import Handle, Peer, Pending
from .tensor import RemoteTensor, launch
from .tree import names, shipped
from .values import pack

AHEAD = 2  # messages of tensors on their way


class Keys(NamedTuple):
    """Names of a module that a state lacks, and of a state that the module lacks; torch's has the same fields."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Several:
    """Modules on workers that change their mode together.

    Attributes:
        proxies: the modules.
        alike: they are replicas of one.
    """

    proxies: list["RemoteModule"]
    alike: bool

    def train(self, mode: bool = True) -> Self:
        for proxy in self.proxies:
            proxy.train(mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def requires_grad_(self, flag: bool = True) -> Self:
        for proxy in self.proxies:
            proxy.requires_grad_(flag)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        for proxy in self.proxies:
            proxy.zero_grad(set_to_none)


class RemoteModule:
    """A module on a worker. Called like one, it gives remote tensors.

    Attributes:
        handle: its place on its worker; it is freed with this object.
        tied: a parameter that is a weight of another module as well (an embedding that is the head); "" for none.
    """

    def __init__(self, handle: Handle, made: dict[str, Any]) -> None:
        self.handle = handle
        self.tied = str(made.get("tied", ""))
        self._class = str(made.get("class"))
        self._flags: dict[str, bool] = {name: bool(flag) for name, flag in made.get("parameters", [])}
        hinted(self, CHAINED)

    def __call__(self, *args: Any, **kwargs: Any) -> RemoteTensor:
        """What its forward returns. Arguments: plain values, tensors, remote tensors of any worker."""
        return self.call(args, kwargs)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], tag: str = "") -> RemoteTensor:
        """The same; its worker notes the tag when it runs."""
        fields = {"module": self.handle.number, "tag": tag}
        return launch(self.peer, "call", fields, [args, kwargs], trainable=any(self._flags.values()))

    @property
    def peer(self) -> Peer:
        return self.handle.peer

    @property
    def worker(self) -> str:
        return self.peer.name

    def __repr__(self) -> str:
        return f"RemoteModule({self._class}, worker={self.worker!r})"

    @property
    def flags(self) -> dict[str, bool]:
        """Names of its parameters, and whether they train."""
        return dict(self._flags)

    # -- parameters

    def named_parameters(self) -> Iterator[tuple[str, RemoteTensor]]:
        """Names and parameters, which stay where they are."""
        for name in self._flags:
            yield name, self.get_parameter(name)

    def get_parameter(self, name: str) -> RemoteTensor:
        """One parameter, which stays where it is."""
        flag, handle = self._flags[name], self.peer.handle()
        made = self.ask("parameter", name=name, out=handle.number)
        found = RemoteTensor(handle, made, Slot(handle if flag else None), content_free() if flag else None)
        hinted(found, OPTIMIZED)
        return found

    def parameters(self) -> list[RemoteTensor]:
        return [parameter for _, parameter in self.named_parameters()]

    def train(self, mode: bool = True) -> Self:
        self.ask("mode", train=mode)
        return self

    def eval(self) -> Self:
        return self.train(False)

    def freeze(self, names: Iterable[str] | None = None) -> Self:
        """These parameters, or all of them, get no gradient any more."""
        return self.requires_grad_(False, names)

    def requires_grad_(self, flag: bool = True, names: Iterable[str] | None = None) -> Self:
        names = list(self._flags if names is None else names)
        unknown = set(names) - set(self._flags)
        if unknown:
            raise KeyError(f"{self!r} has no parameter {sorted(unknown)[0]}")
        self.ask("trains", flag=flag, names=names)
        self._flags.update(dict.fromkeys(names, flag))
        return self

    def changed(self, parameters: Iterable[Sequence[Any]]) -> None:
        """Its worker made other parameters: names, and whether they train."""
        self._flags = {name: bool(flag) for name, flag in parameters}

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            self.peer.quiet(grads=True)
        self.ask("zero", to_none=set_to_none)

    # -- its tensors

    def state_dict(self, only: Sequence[str] = ()) -> dict[str, torch.Tensor]:
        """All parameters and buffers, here; or those of these names."""
        names = list(only)
        told = self.ask("state", only=names).result()[0]
        return downloaded(told, lambda where: self.ask("piece", where=where, only=names))

    def load_state_dict(self, state: Mapping[str, torch.Tensor], strict: bool = True) -> Keys:
        """Takes these values for its own. Without `strict` the names may be others, but not the shapes, as in torch.

        Raises:
            RuntimeError: names or shapes are others.
            TypeError: what is given is no map from names to tensors of this process.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"a state is a map from names to tensors, not a {type(state).__name__}: see state_dict()")
        odd = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
        if odd is not None:
            what = type(state[odd]).__name__
            raise TypeError(f"{odd} of the state is a {what}, not a tensor: fetch a remote one with to_here()")
        self.peer.quiet()
        staging = uploaded(self.peer, list(state.values()))
        told = self.ask("load", staging=staging.number, names=list(state), strict=strict).result()[0]
        return Keys(list(told["missing"]), list(told["unexpected"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes its state as a safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, os.fspath(path))

    def ask(self, verb: str, keeps: Iterable[Handle] = (), **fields: Any) -> Pending:
        """A call of its worker about this module."""
        return self.peer.ask(verb, {"module": self.handle.number, **fields}, (), keeps)


def remote_copy(module: nn.Module, worker: str, device: str = "", *, broker: str | None = None) -> RemoteModule:
    """A copy of a live module on a worker.

    What travels are the names of its classes, the arguments of their constructors, and its tensors.

    Args:
        worker: the name that it was started with: `ralmq worker module -o name=...`.
        device: of the worker, as cuda:1; its own default where not given.
        broker: its address; of ralmq.remote.connect, or $RALMQ_BROKER, where not given.

    Raises:
        Refused: the module cannot travel, with the reason.
        NoService: there is no such worker.
    """
    if not isinstance(module, nn.Module):
        raise Refused(f"remote_copy takes a torch module, not a {type(module).__name__}: see to_worker for tensors")
    peer = home(broker).peer(worker)
    shipment = shipped(module)
    for name in sorted(names(shipment.body["tree"])):
        if name.startswith("__main__:"):
            own = name.partition(":")[2]
            raise Refused(
                f"{own} is a class of this program alone: put it into a module that the worker can import, as "
                f"my_blocks.py, and start the worker with -o allow=my_blocks:{own}"
            )
        if ":" in name and name not in peer.allowed:
            raise Refused(
                f"{worker} builds no {name}: start it with -o allow={','.join([*sorted(peer.allowed), name])}"
            )
    staging = uploaded(peer, shipment.tensors)
    handle = peer.handle()
    fields = {**shipment.body, "staging": staging.number, "device": device, "out": handle.number}
    return RemoteModule(handle, peer.ask("copy", fields).result()[0])


def built(name: str, worker: str, device: str = "", *, broker: str | None = None, **options: Any) -> RemoteModule:
    """A module that the worker builds itself.

    Args:
        name: nn.<Class> of torch, or a class that the worker was started with (`-o allow=package.module:Class`).
        options: arguments of its constructor: plain values.

    Raises:
        Refused: the worker has no such module, or cannot build it with these arguments.
    """
    if not isinstance(name, str):
        raise Refused(f"a module is named by a text, as 'nn.Linear', not by a {type(name).__name__}; see remote_copy")
    peer = home(broker).peer(worker)
    handle = peer.handle()
    fields = {"name": name, "device": device, "out": handle.number, "a": pack([(), options], [])}
    return RemoteModule(handle, peer.ask("build", fields).result()[0])


def uploaded(peer: Peer, tensors: Sequence[torch.Tensor], specs: list[list[Any]] | None = None) -> Handle:
    """Tensors on their way to a worker, in pieces; the handle of where they gather.

    Args:
        specs: their dtypes and shapes, where each tensor is read only when it is asked for.
    """
    handle = peer.handle()
    if specs is None:
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors]
        specs = chunks.specs(tensors)
    under_way = deque([peer.ask("stage", {"specs": specs, "out": handle.number})])
    for where in chunks.pieces(chunks.sizes_of(specs)):
        digest, found = chunks.cut(tensors, where)
        fields = {"staging": handle.number, "where": where, "sha256": digest}
        under_way.append(peer.ask("put", fields, found))
        if len(under_way) > AHEAD:
            under_way.popleft().result()
    for pending in under_way:
        pending.result()
    return handle


def downloaded(told: dict[str, Any], ask: Callable[[list[chunks.Piece]], Pending]) -> dict[str, torch.Tensor]:
    """Tensors of a worker, here, in pieces; `told` is its description of them."""
    staging = chunks.Staging(told["specs"])
    under_way: deque[tuple[list[chunks.Piece], Pending]] = deque()

    def take() -> None:
        where, pending = under_way.popleft()
        body, tensors = pending.result()
        staging.put(where, tensors, body["sha256"])

    for where in chunks.pieces(told["sizes"]):
        under_way.append((where, ask(where)))
        if len(under_way) > AHEAD:
            take()
    while under_way:
        take()
    return dict(zip(told["names"], staging.complete(), strict=True))
