"""How much memory a broker's process has, and from where on it takes no new work."""

import ctypes
import mmap
from pathlib import Path

import pytest
from ralmq.broker import memory

MIB = 1 << 20


def test_what_is_resident_grows_by_what_is_written() -> None:
    before = memory.resident()
    with mmap.mmap(-1, 32 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:  # malloc might use what it has freed
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        grown = memory.resident() - before
        assert 28 * MIB < grown < 48 * MIB
        shown = Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]
        assert abs(int(shown) * 1024 - memory.resident()) < 8 * MIB


def test_where_the_system_does_not_tell_nothing_is_resident(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "STATM", tmp_path / "none")
    assert memory.resident() == 0


@pytest.mark.parametrize(("group", "expected"), [("max\n", None), (None, None), (f"{64 * MIB}\n", 32 * MIB)])
def test_the_watermark_is_half_of_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: str | None, expected: int | None
) -> None:
    """Of the machine where no container has less; /proc/meminfo counts the same pages as sysconf."""
    file = tmp_path / "memory.max"
    if group is not None:
        file.write_text(group)
    monkeypatch.setattr(memory, "GROUP", file)
    total = int(Path("/proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]) * 1024
    assert memory.watermark() == (expected or total // 2)


def test_what_is_free_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole below what is still in use is kept by malloc until it is asked."""
    blocks = [ctypes.create_string_buffer(64 * 1024) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, 64 * 1024)
    kept = ctypes.create_string_buffer(64 * 1024)
    full = memory.resident()
    del block
    blocks.clear()
    memory.give_back()
    assert memory.resident() < full - 40 * MIB
    assert len(kept) == 64 * 1024
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back()  # a C library without it
