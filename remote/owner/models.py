"""Modules of callers: built, loaded, read out, switched. In the compute thread. Knows no message."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...schema.errors import Malformed, Refused
from ..chunks import Staging, cut, sizes, specs
from ..tree import built, received
from .call import Call
from .compute import Answer, described

Classes = Mapping[str, type[nn.Module]]
Builders = Mapping[str, Callable[..., nn.Module]]


class Models:
    """The verbs that are about modules.

    Args:
        classes: what may be built from a tree, by name.
        builders: what may be built by name alone: the registry.
    """

    def __init__(self, classes: Classes, builders: Builders) -> None:
        self._classes = classes
        self._builders = builders
        self.verbs: dict[str, Callable[[Call], Answer]] = {
            "stage": _stage,
            "put": _put,
            "copy": self._copy,
            "build": self._build,
            "load": _load,
            "state": _state,
            "piece": _piece,
            "mode": _mode,
            "trains": _trains,
            "zero": _zero,
            "parameter": _parameter,
        }

    def _copy(self, call: Call) -> Answer:
        staging = staging_of(call)
        module = received(call.body, staging.complete(), self._classes)
        call.table.drop([call.number("staging")], [])
        return kept(call, module)

    def _build(self, call: Call) -> Answer:
        name, (_, options) = call.text("name"), call.values()
        if name in self._builders:
            return kept(call, self._builders[name](**options))
        if name not in self._classes:
            known = ", ".join([*self._builders, *(other for other in self._classes if ":" in other), "nn.<Class>"])
            raise Refused(f"this worker has no module called {name[:200]}: there are {known}")
        if any(isinstance(value, dict | nn.Module) for value in options.values()):
            raise Refused(f"{name} is built here from plain values alone: copy it with remote_copy")
        tree = {"class": name, "args": {key: _plain(value) for key, value in options.items()}}
        return kept(call, built(tree, self._classes, "cpu"))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(entry) for entry in value]}
    return value


def kept(call: Call, module: nn.Module) -> Answer:
    device = call.body.get("device")
    try:
        place = torch.device(device) if isinstance(device, str) and device else call.device
        if place.type == "meta":
            raise Refused("the device meta holds no weights: give cpu, cuda or cuda:1")
        module.to(place)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"the module cannot be on {device}: {error}") from None
    call.table.set(call.out, module)
    names = [[name, parameter.requires_grad] for name, parameter in module.named_parameters()]
    return {"class": type(module).__name__, "parameters": names}, []


def staging_of(call: Call) -> Staging:
    found = call.table.value(call.number("staging"))
    if not isinstance(found, Staging):
        raise Malformed("no tensors were announced under this number")
    return found


def _stage(call: Call) -> Answer:
    described = call.body.get("specs")
    if not isinstance(described, list):
        raise Malformed("tensors without a description")
    call.table.set(call.out, Staging(described))
    return {}, []


def _put(call: Call) -> Answer:
    staging_of(call).put(call.body.get("where", []), call.tensors, call.text("sha256"))
    return {}, []


def module_of(call: Call) -> nn.Module:
    found = call.table.value(call.number("module"))
    if not isinstance(found, nn.Module):
        raise Malformed("what is asked about is no module")
    return found


def _load(call: Call) -> Answer:
    module, names = module_of(call), call.body.get("names")
    tensors = staging_of(call).complete()
    if not isinstance(names, list) or len(names) != len(tensors):
        raise Malformed("a state without names")
    found = module.load_state_dict(dict(zip(names, tensors, strict=True)), strict=bool(call.body.get("strict", True)))
    call.table.drop([call.number("staging")], [])
    return {"missing": found.missing_keys, "unexpected": found.unexpected_keys}, []


def _chosen(call: Call) -> dict[str, torch.Tensor]:
    """Its parameters and buffers; those alone that are named, where some are."""
    state, only = module_of(call).state_dict(), call.body.get("only")
    if not only:
        return state
    if not isinstance(only, list) or any(name not in state for name in only):
        raise Malformed("some of these tensors are not there")
    return {name: state[name] for name in only}


def _state(call: Call) -> Answer:
    state = _chosen(call)
    tensors = list(state.values())
    return {"names": list(state), "specs": specs(tensors), "sizes": sizes(tensors)}, []


def _piece(call: Call) -> Answer:
    digest, found = cut(list(_chosen(call).values()), call.body.get("where", []))
    return {"sha256": digest}, found


def _mode(call: Call) -> Answer:
    module_of(call).train(bool(call.body.get("train")))
    return {}, []


def _trains(call: Call) -> Answer:
    names = call.body.get("names")
    if not isinstance(names, list):
        raise Malformed("parameters without their names")
    for name, parameter in module_of(call).named_parameters():
        if name in names:
            parameter.requires_grad_(bool(call.body.get("flag")))
    return {"parameters": [[name, found.requires_grad] for name, found in module_of(call).named_parameters()]}, []


def _zero(call: Call) -> Answer:
    module_of(call).zero_grad(set_to_none=bool(call.body.get("to_none", True)))
    return {}, []


def _parameter(call: Call) -> Answer:
    found = dict(module_of(call).named_parameters(remove_duplicate=False)).get(call.text("name"))
    if found is None:
        raise KeyError(f"the module has no parameter {call.text('name')[:200]}")
    call.table.set(call.out, found)
    return {"is": described(found)}, []
