"""The registry of acceptance checks: a line each of bound, measured, ok. Knows no check."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

Check = Callable[[Path], AsyncIterator["Line"]]


@dataclass(frozen=True, slots=True)
class Point:
    """One bar of a plot of docs/performance.md: which plot, where in it, of which colour, how high."""

    plot: str
    at: str
    series: str
    value: float


@dataclass(frozen=True, slots=True)
class Line:
    """One measurement beside its bound, as shown; `required` is False for a target that decides nothing."""

    what: str
    bound: str
    measured: str
    ok: bool
    points: tuple[Point, ...] = ()
    required: bool = True


CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Registers a check: an async generator of lines, given an empty folder for logs and files.

    A module called check_<theme>.py in this folder is found by run.py by itself.
    """
    CHECKS[function.__name__] = function
    return function
