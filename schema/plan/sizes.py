"""Bytes as people write them. Knows numbers and units alone."""

import re
from typing import Final

from ..errors import Refused

UNITS: Final = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
UNITS_OF_TEN: Final = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST: Final = 1 << 60  # bytes
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def read_size(text: str) -> int:
    """Bytes of `8GiB`, `512MiB`, `20GB`, or a plain number of bytes of at least 1 MiB.

    Raises:
        Refused: it is none of these, or nothing.
    """
    found = _SIZE.fullmatch(text)
    factor = {**UNITS, **UNITS_OF_TEN}.get(found[2].upper()) if found else None
    size = float(found[1]) * factor if found and factor else 0.0
    if found and not found[2] and size < UNITS["MIB"]:  # 8 is meant to be more than eight bytes
        raise Refused(f"{text!r} is no amount of memory: give a unit, as {text.strip()}GiB")
    if not 1 <= size <= MOST:
        raise Refused(f"{text!r} is no amount of memory: give one such as 8GiB, 512MiB or 20GB")
    return int(size)


def size_text(count: int) -> str:
    """A number of bytes with three digits and its unit, as 1.25 GiB."""
    size, unit = float(abs(count)), "B"
    larger = iter(("KiB", "MiB", "GiB", "TiB"))
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(larger)
    sign = "-" if count < 0 else ""
    return f"{sign}{size:.3g} {unit}" if size < 1000 else f"{sign}{size:.0f} {unit}"
