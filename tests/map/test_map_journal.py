"""The journal of a job, whatever ends a run and whoever else has it: cut at any byte, no room, a second run."""

import asyncio
import errno
import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest
from map_files import Files, There, wanted
from ralmq.client.journal import Journal, Rows
from ralmq.errors import Refused


class Full:
    """A file on a disk that has room for so many more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(len(data), self.room)
        self.room -= count
        return int(self._file.write(bytes(data[:count])))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", range(1, 14))
def test_a_line_that_found_no_room_leaves_nothing_behind(tmp_path: Path, room: int) -> None:
    """Wherever it was cut: with the next line behind it, it could be that of another row."""
    files = Files(tmp_path, 20)
    rows = Rows(files.source)
    with Journal(files.target, rows, "square") as journal:
        journal.add([(0, 0, False)])
        full = Full(journal._file, room)
        journal._file = full  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space"):
            journal.add([(1, 17, False), (12, 9, False)])
        full.room = 1000
        journal.add([(3, 33, False)])
    with Journal(files.target, rows, "square") as journal:
        assert [n for n in range(20) if journal.has(n)] == [0, 3]
        journal.add([(n, n, False) for n in range(20) if n not in (0, 3)])
        journal.finish()
    assert files.output == [33 if n == 3 else n for n in range(20)]


async def test_a_journal_cut_at_any_byte_gives_the_same_output(tmp_path: Path) -> None:
    files = Files(tmp_path, 12)
    files.stop = 11
    with pytest.raises(KeyError):
        await files.map(There(), concurrency=3)
    whole, files.stop = files.journal.read_bytes(), -1
    for end in range(len(whole)):
        files.journal.write_bytes(whole[:end])
        found = await files.map(There())
        assert found.before == max(0, whole[:end].count(b"\n") - 1)
        assert files.output == wanted(12)
        files.target.unlink()


async def test_a_second_run_waits_for_the_end_of_a_first_that_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the output is written it is the first run's; and a journal that is gone is not begun again."""
    files, begun, on = Files(tmp_path, 3), threading.Event(), threading.Event()
    finish = Journal.finish

    def slowly(journal: Journal) -> None:
        begun.set()
        assert on.wait(20)
        finish(journal)

    monkeypatch.setattr(Journal, "finish", slowly)
    task = asyncio.create_task(files.map(There()))
    assert await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    await asyncio.sleep(0.05)
    with pytest.raises(Refused, match="another run is writing"):
        await files.map(There())
    on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files.output == wanted(3) and not files.journal.exists()


def test_a_journal_that_another_run_has_removed_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though one of that name is there again."""
    files = Files(tmp_path, 3)
    rows = Rows(files.source)
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        files.journal.unlink()
        files.journal.write_bytes(b"")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(Refused, match="has just ended"), Journal(files.target, rows, "square"):
        pass
