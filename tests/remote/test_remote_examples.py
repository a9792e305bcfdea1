"""The examples do what they say, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from remote_served import Served
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(served: Served, name: str, folder: Path, *arguments: str) -> list[float]:
    """The losses that it prints."""
    ended = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        env={**os.environ, "RALMQ_BROKER": served.url, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return [float(found) for found in re.findall(r"loss ([0-9.]+)", ended.stdout)]


def test_remote_copy(served: Served, tmp_path: Path) -> None:
    losses = run(served, "remote_copy.py", tmp_path)
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert load_file(tmp_path / "one.safetensors")["weight"].shape == (16, 16)


def test_pipeline_training(served: Served, tmp_path: Path) -> None:
    losses = run(served, "pipeline_training.py", tmp_path, "one", "two", "three")
    assert len(losses) == 20 and losses[-1] < losses[0] / 1.3


def test_data_parallel_training(served: Served, tmp_path: Path) -> None:
    losses = run(served, "data_parallel_training.py", tmp_path, "one", "two", "three")
    assert len(losses) == 20 and losses[-1] < losses[0] / 1.3


def test_a_hugging_face_model_over_two_workers(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    losses = run(served, "hf_over_two_workers.py", tmp_path)
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 6 * 2 * 2


@pytest.mark.parametrize(
    "name", ["remote_copy.py", "pipeline_training.py", "data_parallel_training.py", "hf_over_two_workers.py"]
)
def test_they_are_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 40


def test_importing_the_face_imports_no_torch() -> None:
    """`ralmq.remote` itself comes without it, too."""
    code = "import sys, ralmq; ralmq.remote; dir(ralmq); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
