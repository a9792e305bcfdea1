"""Exceptions on their way: of the same type at the other end where it is one of a fixed list. Runs no code for it."""

import builtins
import traceback
from typing import Any, Final

import torch

from ..schema.errors import CLASSES, RalmqError, WorkerFailed, error_of

_BUILT_IN: Final = (
    "ArithmeticError",
    "AssertionError",
    "AttributeError",
    "BufferError",
    "EOFError",
    "FileNotFoundError",
    "FloatingPointError",
    "ImportError",
    "IndexError",
    "KeyError",
    "LookupError",
    "MemoryError",
    "NameError",
    "NotImplementedError",
    "OSError",
    "OverflowError",
    "PermissionError",
    "RecursionError",
    "RuntimeError",
    "StopIteration",
    "TimeoutError",
    "TypeError",
    "ValueError",
    "ZeroDivisionError",
)
TYPES: Final[dict[str, type[Exception]]] = {
    **{name: getattr(builtins, name) for name in _BUILT_IN},
    "OutOfMemoryError": torch.OutOfMemoryError,
    "LinAlgError": torch.linalg.LinAlgError,  # type: ignore[attr-defined]
}
MOST: Final = 16_000  # characters of a traceback


def told(error: BaseException) -> dict[str, Any]:
    """An exception as it travels. One that came from elsewhere keeps the traceback that it came with."""
    trace = getattr(error, "remote_traceback", "") or "".join(traceback.format_exception(error))
    if isinstance(error, RalmqError):
        return {"code": error.code, "text": error.message, "trace": trace[-MOST:]}
    name = next((cls.__name__ for cls in type(error).__mro__ if TYPES.get(cls.__name__) is cls), "")
    own = f"{type(error).__name__}: " if name != type(error).__name__ else ""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return {"type": name, "text": f"{own}{text}"[:MOST], "trace": trace[-MOST:]}


def raised(said: Any) -> Exception:
    """The exception that was told, with the text of its traceback as a note and in `remote_traceback`."""
    if not isinstance(said, dict):
        return WorkerFailed("a worker failed without a word: see its log")
    text, trace = str(said.get("text", "")), str(said.get("trace", ""))
    made: Exception
    if said.get("code") in CLASSES:
        made = error_of(said["code"], text)
    elif (found := TYPES.get(str(said.get("type")))) is not None:
        made = found(text)
    else:
        made = WorkerFailed(text)
    made.remote_traceback = trace  # type: ignore[attr-defined]
    made.add_note(f"on the worker:\n{trace}")
    return made
