"""The demo's job against real processes, with small limits: how it ends, what it leaves, what its table says."""

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MARK = "RALMQ_TEST_MARK"
SMALL = """
from functools import partial
import ralmq.demo.run as demo
from ralmq.cli.main import app
demo.Plan = partial(demo.Plan, store=4000, control=2000, development=600, held_out=1000, generated=8, k=8)
app()
"""
COMMAND = (sys.executable, "-m", "ralmq", "demo")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command whose temporary files and processes can be told from those of others."""
    mark = uuid.uuid4().hex
    files = tmp_path / "tmp"
    files.mkdir()
    started: list[subprocess.Popen[str]] = []

    def begin(*command: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, MARK: mark, "TMPDIR": str(files), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
            pytest.fail("the demo did not end")
    assert marked(mark) == []
    assert list(files.iterdir()) == []


def marked(mark: str) -> list[str]:
    """Command lines of the processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def small(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", SMALL, "demo", *arguments)


def read_until(process: "subprocess.Popen[str]", line: str) -> str:
    """The first line of the output that holds `line`."""
    assert process.stdout is not None
    while line not in (found := process.stdout.readline()):
        assert found, f"ended before {line!r}: {process.stderr.read() if process.stderr else ''}"
    return found


def bits(output: str, row: str) -> float:
    found = re.search(rf"^ {re.escape(row)} +(\d+\.\d+)", output, re.MULTILINE)
    assert found, f"no row {row!r} in:\n{output}"
    return float(found[1])


def test_runs_and_leaves_nothing(start: Start) -> None:
    process = start(*small())
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert "\x1b" not in output and "\r" not in output
    assert max(map(len, output.splitlines())) <= 100
    for name in ("broker", "stage-0", "stage-1", "generator", "search:numpy"):
        assert name in output
    alone, near = bits(output, "model alone"), bits(output, "+ kNN")
    shuffled = bits(output, "+ kNN, values shuffled (control)")
    assert near < alone and near < shuffled
    assert bits(output, "+ kNN, wrong documents (control)") > near
    counts, both = bits(output, "+ n-gram counts"), bits(output, "+ kNN and n-gram counts")
    assert 0 < both < alone and counts > 0
    assert "without retrieval: 8 tokens" in output and "with retrieval from numpy: 8 tokens" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["1. A cluster", "2. A datastore", "3. The same prompt"])
def test_a_signal_ends_it_with_one_line(start: Start, place: str, number: signal.Signals) -> None:
    process = start(*small())
    read_until(process, place)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.count("\n") == 1 and errors.startswith("ralmq: stopped")


def test_a_process_that_is_killed_ends_it_with_one_line(start: Start) -> None:
    process = start(*small())
    pid = int(read_until(process, "stage-1").split()[1])
    read_until(process, "2. A datastore")
    os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("\n") == 1 and errors.startswith("ralmq: ")


def test_a_folder_of_ones_own(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(12):
        lines = [f"Note {number}, line {line}: the pump of house {number * line} was greased." for line in range(60)]
        (folder / f"note{number}.txt").write_text("\n".join(lines))
    process = start(*small("--folder", str(folder)))
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert "the texts of notes" in output and "note" in output
    assert bits(output, "+ kNN") < bits(output, "model alone")


@pytest.mark.parametrize("content", [None, "", "a few words"])
def test_a_folder_with_too_little_text_is_refused(start: Start, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "notes"
    if content is not None:
        folder.mkdir()
        (folder / "note.txt").write_text(content)
    process = start(*COMMAND, "--folder", str(folder))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == "" and errors.count("\n") == 1 and str(folder) in errors
