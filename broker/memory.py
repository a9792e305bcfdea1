"""How much memory this process has, and how much it should at most. Part of the shell: reads the machine."""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
STATM: Final = Path("/proc/self/statm")
GROUP: Final = Path("/sys/fs/cgroup/memory.max")  # of a container


def resident() -> int:
    """Bytes in memory now; 0 where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * PAGE
    except OSError:
        return 0


def watermark() -> int:
    """Half of what the machine, or the container, has."""
    have = os.sysconf("SC_PHYS_PAGES") * PAGE
    with contextlib.suppress(OSError, ValueError):  # no such file, or the word max
        have = min(have, int(GROUP.read_text()))
    return have // 2


def give_back() -> None:
    """Returns memory that is free to the system: else a queue that was long once would count for ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
