"""The registry of acceptance checks: a line each of bound, measured, ok. Knows no check."""

import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
COUNTED: list[str] = []  # the checks that count, and have a small size
QUICK: Final = "--quick" in sys.argv


def check(function: Check) -> Check:
    """Registers a check: an async generator of lines, given an empty folder for logs and files.

    A module called check_<theme>.py in this folder is found by run.py by itself.
    """
    CHECKS[function.__name__] = function
    return function


def counted(function: Check) -> Check:
    """Registers a check that counts and times nothing but what it prints: `--quick` runs these, in their small size."""
    COUNTED.append(function.__name__)
    return check(function)


def size(full: int, small: int) -> int:
    """How often something is done."""
    return small if QUICK else full
