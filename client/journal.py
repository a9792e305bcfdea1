"""The files of a job over rows: its input, checked and hashed, and a journal of what is done. Knows no service.

The journal is a line of the job and one line a row, in the order in which they were done; a line is on the disk before
its row counts. When all are done the output is written from it, in the order of the input, and takes its place at once.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from array import array
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from ..schema.errors import Refused

SUFFIX: Final = ".progress"  # of the journal, behind the output's name
_FIRST: Final = b"ralmq map 1"
_MISSING: Final = -1


class Rows:
    """The lines of a .jsonl file, each an object; empty ones are passed over.

    Attributes:
        count: how many there are.
        digest: sha256 of the file, in hex.

    Raises:
        Refused: the file cannot be read, or a line is no JSON object; it is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        digest = hashlib.sha256()
        if path.exists() and not path.is_file():
            raise Refused(f"{path}: is read more than once: name a file, no pipe or folder")
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    if line.strip():
                        self._object(number, line)
                        self.count += 1
        except OSError as error:
            raise Refused(f"{path}: cannot be read ({error.strerror}): name a .jsonl file") from None
        self.digest = digest.hexdigest()

    def __iter__(self) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """Each row's number, from 0 on, and its object.

        Raises:
            Refused: at the end: it is not the file any more that was counted.
        """
        row, digest = 0, hashlib.sha256()
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip() and row < self.count:
                    yield row, self._object(number, line)
                if line.strip():
                    row += 1
        if digest.hexdigest() != self.digest:
            raise Refused(
                f"{self.path}: has changed while it was read, and answers may be of other rows: "
                "remove the journal beside the output, and begin anew"
            )

    def _object(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{self.path}: line {number}: no JSON ({error}): write one object a line") from None
        if not isinstance(found, dict):
            raise Refused(f'{self.path}: line {number}: no object: write one a line, as {{"text": "hi"}}')
        return found


class Journal:
    """What is done of a job; opened by `with`, which goes on with what an earlier run has left.

    Args:
        target: the output; the journal lies beside it.
        job: what is done, in a word; the same one goes on, another one is refused.

    Raises:
        Refused: the output is there already, the journal belongs to another input or job, or another run writes it.
    """

    def __init__(self, target: Path, rows: Rows, job: str) -> None:
        if target.is_dir() or not target.name:
            raise Refused(f"{target}: is a folder: name a file in it")
        self._target, self._source = target, rows.path
        self.path = target.with_name(target.name + SUFFIX)
        self._job = {"input": rows.digest, "rows": rows.count, "job": job}
        self._places = array("q", [_MISSING]) * rows.count
        self._end = 0
        self.done = 0
        self.failed = 0

    def __enter__(self) -> Self:
        if self._target.exists() and self._target.samefile(self._source):
            raise Refused(f"{self._target}: is the input: name another file for the answers")
        if self._target.exists() and not self.path.exists():
            raise Refused(f"{self._target}: is there already: remove it, or name another file")
        try:
            self._file: BinaryIO = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", 0)
        except OSError as error:
            raise Refused(f"{self.path}: cannot be written ({error.strerror}): name a file elsewhere") from None
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def has(self, row: int) -> bool:
        """Whether a row is done."""
        return self._places[row] != _MISSING

    def add(self, records: Sequence[tuple[int, Any, bool]]) -> None:
        """Rows that are done: number, document, and whether it failed. They are on the disk when this returns.

        Raises:
            OSError: they are not.
        """
        lines = [b"%d\t%d\t%s\n" % (row, failed, _written(document)) for row, document, failed in records]
        self._append(b"".join(lines))
        for (row, _, failed), line in zip(records, lines, strict=True):
            self._note(row, failed, len(line))

    def finish(self) -> None:
        """Writes the output in the order of the input; then the journal is not needed any more."""
        part = self._target.with_name(self._target.name + ".part")
        with part.open("wb") as file, self.path.open("rb") as journal:
            for place in self._places:
                journal.seek(place)
                file.write(journal.readline().split(b"\t", 2)[2])
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._target)
        self._settle()
        self.path.unlink()

    # -- inside

    def _open(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(f"{self.path}: another run is writing it: wait for its end") from None
        if not os.fstat(self._file.fileno()).st_nlink:
            raise Refused(f"{self.path}: another run has just ended: see its output")
        with self.path.open("rb") as lines:
            first = lines.readline()
            if first.endswith(b"\n"):
                self._check(first)
                self._end = len(first)
                for line in lines:
                    if not self._known(line):
                        break  # torn, where the run before was killed: that row was not done
            elif not (_FIRST + b"\t").startswith(first[: len(_FIRST) + 1]):
                self._check(first)
        if self._target.exists() and self.done < len(self._places):
            raise Refused(f"{self._target}: is there already: remove it, or name another file")
        self._file.truncate(self._end)
        self._file.seek(self._end)
        if not self._end:
            self._append(_FIRST + b"\t" + _written(self._job) + b"\n")
            self._end = self._file.tell()
            self._settle()

    def _check(self, first: bytes) -> None:
        head, _, told = first.partition(b"\t")
        found: Any = None
        with contextlib.suppress(ValueError):
            found = json.loads(told)
        if head != _FIRST or not isinstance(found, dict):
            raise Refused(f"{self.path}: is no journal of `ralmq map`: name another output, or move that file away")
        if found.get("input") != self._job["input"]:
            raise Refused(f"{self.path}: the input has changed since: restore it, or remove that file to begin anew")
        if found != self._job:
            raise Refused(
                f"{self.path}: belongs to another job ({found.get('job')}; this one: {self._job['job']}): "
                "ask for the same, or remove that file to begin anew"
            )

    def _known(self, line: bytes) -> bool:
        """Takes note of a line as `add` writes it; False for another."""
        try:
            row, failed, document = line.split(b"\t", 2)
            number = int(row)
            json.loads(document)
        except ValueError:
            return False
        if not line.endswith(b"\n") or not 0 <= number < len(self._places) or self.has(number):
            return False
        self._note(number, failed == b"1", len(line))
        return True

    def _note(self, row: int, failed: bool, size: int) -> None:
        self._places[row] = self._end
        self._end += size
        self.done += 1
        self.failed += failed

    def _append(self, data: bytes) -> None:
        """Behind what is there; all of it, or nothing: half a line would be in the way of the next one."""
        begin = self._file.tell()
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(begin)
            self._file.seek(begin)
            raise

    def _settle(self) -> None:
        """The folder's own entry on the disk."""
        folder = os.open(self._target.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _written(document: Any) -> bytes:
    try:
        return json.dumps(plain(document), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character of two, which only an escape can hold
        return json.dumps(plain(document)).encode()


def plain(value: Any) -> Any:
    """As JSON holds it: numbers that it does not have become null, bytes become hex digits."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return value.hex()
    return value
