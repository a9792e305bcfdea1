"""`ralmq split`: what it writes, what it says, and one line for what cannot be split."""

from pathlib import Path

import pytest
from commands import env_of, ralmq
from ralmq.cli.main import app
from typer.testing import CliRunner


def test_a_directory_for_each_stage(tmp_path: Path) -> None:
    done = ralmq("split", "demo", "--stages", "3", "parts", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(folder.name for folder in (tmp_path / "parts").iterdir()) == ["0", "1", "2"]
    for place in range(3):
        assert (tmp_path / "parts" / str(place) / "ralmq_fingerprint").is_file()
        assert f"-o model=parts/{place} -o stage={place}/3 -o name=demo" in done.stdout
    assert "split" in done.stderr  # the progress bar is no part of what it says


def test_layers_that_a_part_lacks_end_a_stage_with_one_line(tmp_path: Path) -> None:
    assert ralmq("split", "demo", "--stages", "2", "parts", home=tmp_path).returncode == 0
    done = ralmq("worker", "stage", "-o", "model=parts/1", "-o", "stage=0/2", "-o", "name=demo", home=tmp_path)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "has no tensor model.layers.0." in line and "only a part of the model" in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["demo", "--stages", "7", "out"], "6 layers split into 1 to 6 stages, not 7"),
        (["demo", "--stages", "0", "out"], "'--stages'"),
        (["demo", "out"], "Missing option '--stages'"),
        (["gone", "--stages", "2", "out"], "gone: no such model directory"),
        (["bare", "--stages", "2", "out"], "holds no *.safetensors file"),
        (["demo", "--stages", "2", "bare"], "bare: is there already and not an empty directory"),
        (["parts/0", "--stages", "2", "out"], "holds only a part of the model"),
    ],
)
def test_what_cannot_be_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env=env_of(tmp_path))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    if "parts/0" in arguments:
        assert runner.invoke(app, ["split", "demo", "--stages", "2", "parts"]).exit_code == 0
    result = runner.invoke(app, ["split", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert part in result.stderr
    assert result.stderr.startswith("ralmq: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    done = ralmq("split", "demo", "--stages", "2", "/proc/nowhere", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ralmq: /proc/nowhere")
