"""The registry of acceptance checks: a line each of bound, measured, ok. Knows no check."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

Check = Callable[[Path], AsyncIterator["Line"]]


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement beside its bound, as shown."""

    what: str
    bound: str
    measured: str
    ok: bool


CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Registers a check: an async generator of lines, given an empty folder for logs and files.

    A module called check_<theme>.py in this folder is found by run.py by itself.
    """
    CHECKS[function.__name__] = function
    return function
