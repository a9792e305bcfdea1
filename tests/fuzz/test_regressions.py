"""Cases that once failed, and those that a fuzz run begins with; the runs themselves are `make fuzz`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.targets import REGRESSIONS, TARGETS, Cursor, case_of, frames_in, seeds
from ralmq.schema.codec import encode
from schema_samples import SAMPLES

RUN = Path(__file__).parent / "run.py"
CASES = sorted(REGRESSIONS.iterdir())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name)
def test_what_failed_once_passes(path: Path) -> None:
    TARGETS[path.name.split("-")[0]](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_run_begins_with_passes(target: str) -> None:
    cases = seeds(target)
    assert len(cases) > 20
    for case in cases:
        TARGETS[target](case)


def test_frames_become_a_case_and_back() -> None:
    for sample in SAMPLES:
        frames = [bytes(frame) for frame in encode(sample)]
        assert frames_in(Cursor(case_of(frames))) == frames


def run(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True, env=environment)


def test_a_run_without_atheris_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text("raise ImportError('not here')")
    ended = run("--seconds", "1", path=str(tmp_path))
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "pip install -e '.[fuzz]'" in ended.stderr


def test_a_case_is_run_again_by_its_name(tmp_path: Path) -> None:
    assert run("--replay", str(CASES[0])).stdout == f"{CASES[0].name}: passes\n"
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert run("--replay", str(other)).returncode == 2
    assert "decode or core" in run("codec").stderr
