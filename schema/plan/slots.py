"""Where a stage can run: a device of a worker, with its memory and its speed. Knows how a user writes them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..errors import Refused
from .sizes import read_size

SLOWEST: Final = 1e-6  # GB/s; what is slower, or faster than FASTEST, is no device
FASTEST: Final = 1e6
UNKNOWN: Final = 1.0  # GB/s that count where no speed is known: all are alike
EXAMPLE: Final = "w1=8GiB, w1=8GiB,12.5 or w1=cuda:0:20GiB+cpu:8GiB,900+12"
_DEVICE: Final = re.compile(r"(?:(cpu|cuda|cuda:\d+|mps|xpu|xpu:\d+):)?([^:]+)")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Slot:
    """One device.

    Attributes:
        name: of the worker, or machine, that has it.
        memory: bytes for weights and cache.
        speed: GB (1e9 bytes) of weights that it reads in a second while it computes one token; 0 where not known.
    """

    name: str
    memory: int
    speed: float = 0.0
    device: str = "cpu"


def read_slots(text: str) -> list[Slot]:
    """The devices of `NAME=MEM[,SPEED]`; MEM may be `cuda:0:20GiB+cpu:8GiB`, SPEED one for all or `900+12`.

    Raises:
        Refused: it is not of that form.
    """
    name, equals, rest = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise Refused(f"--worker {text}: give NAME=MEMORY[,SPEED], as {EXAMPLE}")
    memories, comma, speeds = rest.partition(",")
    return devices_of(name, memories, read_speeds(speeds) if comma else ())


def devices_of(name: str, memories: str, speeds: tuple[float, ...] = ()) -> list[Slot]:
    """The devices of one worker: `8GiB`, or `cuda:0:20GiB+cpu:8GiB`; no speed, one for all, or one for each.

    Raises:
        Refused: a device is named twice or not understood, or the numbers of speeds and devices differ.
    """
    found: list[Slot] = []
    for part in memories.split("+"):
        match = _DEVICE.fullmatch(part.strip())
        if match is None:
            raise Refused(f"{name}: {part.strip()!r} is no memory of a device: give {EXAMPLE}")
        found.append(Slot(name, read_size(match[2]), device=match[1] or "cpu"))
    twice = {slot.device for slot in found if sum(other.device == slot.device for other in found) > 1}
    if twice:
        raise Refused(f"{name}: device {min(twice)} is named twice: give its memory once")
    if speeds and len(speeds) not in (1, len(found)):
        raise Refused(f"{name}: {len(speeds)} speeds for {len(found)} devices: give one for each, or one for all")
    each = speeds * len(found) if len(speeds) == 1 else speeds or (0.0,) * len(found)
    return [Slot(name, slot.memory, speed, slot.device) for slot, speed in zip(found, each, strict=True)]


def read_speeds(text: str) -> tuple[float, ...]:
    """The numbers of `12.5` or `900+12`, GB/s.

    Raises:
        Refused: one is no number above 0.
    """
    return tuple(_speed(part) for part in text.split("+"))


def with_speeds(slots: Sequence[Slot]) -> list[Slot]:
    """Devices whose speed is not known count with the mean of the others."""
    known = [slot.speed for slot in slots if slot.speed]
    common = sum(known) / len(known) if known else UNKNOWN
    return [replace(slot, speed=slot.speed or common) for slot in slots]


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not SLOWEST <= speed <= FASTEST:
        raise Refused(f"{text!r} is no speed: give the GB/s that the device reads weights with, as 12.5")
    return speed
