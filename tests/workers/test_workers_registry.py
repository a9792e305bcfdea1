"""Worker classes by name."""

import sys
from pathlib import Path

import pytest
from ralmq.schema.errors import Refused
from ralmq.workers.echo import Echo
from ralmq.workers.registry import BUILT_IN, find


def test_built_in() -> None:
    assert find("echo") is Echo
    assert find("ralmq.workers.echo:Echo") is Echo
    assert {"echo", "stage", "index", "generator"} <= set(BUILT_IN)


def test_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "local_worker_module.py").write_text("import ralmq\nclass Mine(ralmq.Worker):\n    service = 'mine'\n")
    assert find("local_worker_module:Mine").service == "mine"
    assert sys.path[0] == str(tmp_path)


def test_the_current_folder_hides_nothing_of_a_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    find("echo")
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nobody", "no worker is called nobody: there are echo, stage, index, generator"),
        ("", "no worker is called"),
        ("no_such_module:Class", "cannot import no_such_module"),
        ("ralmq.workers.echo:Nothing", "no subclass of ralmq.Worker"),
        ("ralmq.workers.echo:random", "no subclass of ralmq.Worker"),
        ("pathlib:Path", "no subclass of ralmq.Worker"),
        (":Class", "names no class"),
        ("module:", "names no class"),
        (".module:Class", "names no class"),
        ("a b:Class", "names no class"),
    ],
)
def test_what_is_no_worker(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Refused, match=part):
        find(name)
