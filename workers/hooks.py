"""Logits hooks: code of a plug-in that changes what a token is drawn from, for the requests that name it.

The operator decides at the start of a stage what is loaded; a request brings a name and parameters. Knows no model.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..schema.errors import Refused
from .registry import imported, look_here

GROUP: Final = "ralmq.logits"

Tokens = NDArray[np.int32]
Values = NDArray[np.float64]
Hooks = Mapping[str, "LogitsHook"]


class LogitsHook:
    """Changes logits or probabilities of a sequence's next token; subclass it, and load it with `-o hooks=my_pkg:Mine`.

    It runs at the last stage, in the thread that computes: what it takes, every sequence waits for. One instance serves
    all sequences; what it keeps between calls it must keep by itself.

    Attributes:
        name: how requests name it: `hooks={"name": {...}}`.
        on: whether values are logits (each finite or -inf) or probabilities (at least 0; they need not sum to 1 after).
    """

    name: str = ""
    on: ClassVar[Literal["logits", "probabilities"]] = "logits"

    def check(self, params: dict[str, Any]) -> None:
        """Raises ValueError for parameters that it cannot use; called before a request takes any memory."""

    def __call__(self, tokens: Tokens, values: Values, params: dict[str, Any]) -> Values:
        """Changed values [vocab]; `values` itself may be changed and returned.

        Args:
            tokens: prompt and output so far, int32 [n], read-only.
            values: of the next token, float64 [vocab].
            params: what the request gave.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__()")


def load_hooks(names: str) -> dict[str, LogitsHook]:
    """Hooks by name, from `module:Class` or entry points of the group ralmq.logits, separated by commas.

    Raises:
        Refused: no such hook, a class that is none or cannot be made, or two of one name.
    """
    found: dict[str, LogitsHook] = {}
    entries: dict[str, str] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        target = name
        if ":" not in name:
            entries = entries or {entry.name: entry.value for entry in entry_points(group=GROUP)}
            if name not in entries:
                known = ", ".join(entries) or "none installed"
                raise Refused(f"no logits hook is called {name}: there are {known}; or give module:Class")
            target = entries[name]
        else:
            look_here()
        kind = imported(target, LogitsHook, "LogitsHook")
        try:
            hook = kind()
        except Exception as error:  # its own code
            raise Refused(f"hook {target} cannot be made ({type(error).__name__}: {error}): correct it") from error
        hook.name = hook.name or (name if ":" not in name else kind.__name__)
        if hook.name in found:
            raise Refused(f"two hooks are called {hook.name}: load one of them, or give one another name")
        found[hook.name] = hook
    return found


def check_hooks(asked: Mapping[str, dict[str, Any]], hooks: Hooks) -> None:
    """Whether what a request names is loaded and takes its parameters.

    Raises:
        Refused: naming the hook.
    """
    for name, params in asked.items():
        if name not in hooks:
            known = f"there are {', '.join(hooks)}" if hooks else "none is loaded"
            raise Refused(f"hook {name} is unknown, {known}: start the stages with -o hooks=module:Class")
        try:
            hooks[name].check(params)
        except Exception as error:  # its own code; a ValueError says what to mend
            raise Refused(f"hook {name} refuses its parameters: {error}") from error


def apply(hook: LogitsHook, tokens: Tokens, logits: NDArray[np.floating], params: dict[str, Any]) -> Values:
    """Logits float64 [vocab] after one hook; one that works on probabilities leaves their normalizer as it was.

    Raises:
        ValueError: what it returned is no distribution over the vocabulary.
        Exception: whatever it raises.
    """
    values: Values = logits.astype(np.float64)
    if hook.on == "logits":
        return _drawable(_array(hook(tokens, values, params), len(logits)))
    top = values.max()
    values = np.exp(values - top)
    total = float(values.sum())
    values /= total
    changed = _array(hook(tokens, values, params), len(logits))
    with np.errstate(divide="ignore", invalid="ignore"):
        values = _drawable(np.log(changed))
    values += top + np.log(total)
    return values


def _array(values: Any, vocab: int) -> Values:
    if not isinstance(values, np.ndarray) or values.shape != (vocab,):
        raise ValueError(f"it returned no array of {vocab} values: return one for each token")
    found: Values = values.astype(np.float64, copy=False)
    return found


def _drawable(logits: Values) -> Values:
    if not np.isfinite(logits.max()):  # also where any is NaN
        raise ValueError("it left no token to draw, or a value that is no number: keep at least one finite")
    return logits
