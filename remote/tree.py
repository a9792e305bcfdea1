"""A live module as a tree of named classes with their arguments, and its tensors beside it; and back. Runs no code
that the tree does not name from a list of the reader's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..schema.errors import RalmqError, Refused
from .classes import CONTAINERS, arguments, wire_name
from .values import DTYPES, PLAIN, leaves

DEPTH: Final = 64
_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_NEVER: Final = {"training"}


@dataclass(frozen=True, slots=True)
class Shipment:
    """A module as it travels.

    Attributes:
        body: the tree, which tensor of `tensors` each parameter and buffer is, which of them require grad, and which
            modules are in eval mode.
        tensors: each once, also where parameters are tied.
    """

    body: dict[str, Any]
    tensors: list[torch.Tensor]


def shipped(module: nn.Module) -> Shipment:
    """A module ready to travel.

    Raises:
        Refused: it cannot travel, with the reason and where in the tree it is.
    """
    for path, part in module.named_modules():
        _check(part, path)
    body: dict[str, Any] = {"tree": _tree(module, "", 0)}
    likeness = built(body["tree"], _classes_of(module), "meta")
    _compare(module, likeness)
    tensors: list[torch.Tensor] = []
    places: dict[int, int] = {}
    named: dict[str, list[Any]] = {}
    for name, tensor in _tensors(module):
        if id(tensor) not in places:
            places[id(tensor)] = len(tensors)
            tensors.append(tensor.detach())
        named[name] = [places[id(tensor)], isinstance(tensor, nn.Parameter), tensor.requires_grad]
    body["named"] = named
    body["eval"] = [name for name, part in module.named_modules() if not part.training]
    return Shipment(body, tensors)


def received(body: dict[str, Any], tensors: list[torch.Tensor], classes: Mapping[str, type[nn.Module]]) -> nn.Module:
    """The module of a shipment, with these tensors as its own.

    Raises:
        Refused: a class that is not on the list, or tensors that are not those of the tree.
    """
    module = built(body["tree"], classes, "meta")
    named = body["named"]
    wanted = {name for name, _ in _tensors(module)}
    if wanted != set(named):
        raise Refused(f"the module needs other tensors than came: {sorted(wanted ^ set(named))[:5]}")
    made: dict[int, torch.Tensor] = {}
    for name, (place, parameter, grad) in named.items():
        if place not in made:
            made[place] = nn.Parameter(tensors[place], requires_grad=grad) if parameter else tensors[place]
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, made[place])
    asleep = set(body["eval"])
    for name, part in module.named_modules():
        part.training = name not in asleep
    return module


def built(tree: Any, classes: Mapping[str, type[nn.Module]], device: str | torch.device, depth: int = 0) -> nn.Module:
    """A module made by the constructors that a tree names.

    Raises:
        Refused: a class that is not on the list, or that cannot be built with these arguments.
    """
    if not isinstance(tree, dict) or depth > DEPTH:
        raise Refused("a module's tree is none, or too deep")
    name = tree.get("class")
    if not isinstance(name, str) or name not in classes:
        raise Refused(
            f"this worker builds no {str(name)[:200]}: start it with -o allow=package.module:Class, or use classes of "
            f"torch.nn"
        )
    kind = classes[name]
    if issubclass(kind, CONTAINERS) and kind in CONTAINERS:
        parts = {key: built(part, classes, device, depth + 1) for key, part in tree.get("children", {}).items()}
        made: nn.Module = kind()
        for key, part in parts.items():
            made.add_module(key, part)
        return made
    given = {key: _argument(value, classes, device, depth) for key, value in tree.get("args", {}).items()}
    try:
        with torch.device(device):
            return kind(**given)
    except RalmqError:
        raise
    except Exception as error:
        raise Refused(f"{name} cannot be built with {sorted(given)}: {type(error).__name__}: {error}") from error


def names(tree: Any) -> set[str]:
    """The classes that a tree names."""
    if isinstance(tree, dict):
        own = {tree["class"]} if isinstance(tree.get("class"), str) else set()
        return own.union(*map(names, tree.values()))
    return set().union(*map(names, tree)) if isinstance(tree, list) else set()


# -- inside


def _check(module: nn.Module, path: str) -> None:
    """Refuses what code was added to at run time: only names of classes travel."""
    where = f" (at {path})" if path else ""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule) or kind.__name__ == "OptimizedModule":
        raise Refused(f"a compiled module does not travel{where}: copy the module that it was made of")
    if parametrize.is_parametrized(module):
        raise Refused(f"a parametrized {kind.__name__} does not travel{where}: remove_parametrizations first")
    hooked = [name for name in _HOOKS if getattr(module, name, None)]
    if hooked:
        raise Refused(f"a {kind.__name__} with hooks ({hooked[0].strip('_')}) does not travel{where}: remove them")
    if "forward" in vars(module):
        raise Refused(f"a {kind.__name__} whose forward was replaced does not travel{where}: make it a class")


def _tree(module: nn.Module, path: str, depth: int) -> dict[str, Any]:
    where = f" (at {path})" if path else ""
    kind = type(module)
    if depth > DEPTH:
        raise Refused(f"a module of more than {DEPTH} levels does not travel")
    name = wire_name(kind)
    if "<" in name:
        raise Refused(f"{kind.__qualname__} is defined within a function{where}: put it into a module")
    if kind in CONTAINERS:
        children = {
            key: _tree(part, f"{path}.{key}".strip("."), depth + 1)
            for key, part in module._modules.items()
            if part is not None
        }
        return {"class": name, "children": children}
    try:
        given = arguments(module)
        return {"class": name, "args": {key: _told(value, f"{path}.{key}", depth) for key, value in given.items()}}
    except Refused as error:
        raise Refused(f"{error.message}{where}" if where not in error.message else error.message) from None


def _told(value: Any, path: str, depth: int) -> Any:
    """An argument as it travels; a map says what is no plain value."""
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, nn.Module):
        return {"module": _tree(value, path.strip("."), depth + 1)}
    if isinstance(value, torch.Tensor):
        return {"like": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple | torch.Size):
        return {"tuple": [_told(entry, path, depth) for entry in value]}
    if isinstance(value, list):
        return {"list": [_told(entry, path, depth) for entry in value]}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"map": {key: _told(entry, path, depth) for key, entry in value.items()}}
    what = "a lambda" if getattr(value, "__name__", "") == "<lambda>" else f"a {type(value).__name__}"
    raise Refused(f"{what} as an argument of a constructor does not travel (at {path.strip('.')}): make it a module")


def _argument(value: Any, classes: Mapping[str, type[nn.Module]], device: Any, depth: int) -> Any:
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        kind, content = next(iter(value.items()))
        if kind == "module":
            return built(content, classes, device, depth + 1)
        if kind == "like":
            return torch.empty(content[1], dtype=DTYPES[content[0]], device=device)
        if kind == "dtype":
            return DTYPES[content]
        if kind in ("tuple", "list"):
            entries = [_argument(entry, classes, device, depth + 1) for entry in content]
            return tuple(entries) if kind == "tuple" else entries
        if kind == "map":
            return {key: _argument(entry, classes, device, depth + 1) for key, entry in content.items()}
    raise Refused("an argument of a constructor is of no known kind")


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, those that no state_dict has among them, by each of their names."""
    found: list[tuple[str, torch.Tensor]] = list(module.named_parameters(remove_duplicate=False))
    return found + list(module.named_buffers(remove_duplicate=False))


def _classes_of(module: nn.Module) -> dict[str, type[nn.Module]]:
    return {wire_name(type(part)): type(part) for part in module.modules()}


def _compare(module: nn.Module, likeness: nn.Module, path: str = "") -> None:
    """Refuses what its class and arguments do not say all about: a rebuilt module must be like it."""
    where = path or type(module).__name__
    if type(module) is not type(likeness) or list(module._modules) != list(likeness._modules):
        raise Refused(f"{where} was changed after it was built, and does not travel: make the change a class")
    for slots in ("_parameters", "_buffers"):
        own, other = ({k: v for k, v in getattr(m, slots).items() if v is not None} for m in (module, likeness))
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in other.items()}:
            raise Refused(f"{where} has other tensors than its class gives it, and does not travel: make it a class")
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NEVER:
            continue
        if leaves(value):
            raise Refused(f"{where}.{name}, a tensor, does not travel: make it a parameter, or use register_buffer")
        if not _same(value, vars(likeness).get(name, _NEVER)):
            raise Refused(f"{where}.{name} does not travel: its constructor does not set it to {value!r:.60}")
    for name, part in module._modules.items():
        if part is not None and likeness._modules[name] is not None:
            _compare(part, likeness._modules[name], f"{path}.{name}".strip("."))  # type: ignore[arg-type]


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and value.shape == other.shape
    if isinstance(value, list | tuple):
        return type(value) is type(other) and len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict):
        return (
            isinstance(other, dict) and value.keys() == other.keys() and all(_same(value[k], other[k]) for k in value)
        )
    try:
        return bool(value == other)
    except Exception:
        return False
