"""The record of `ralmq up`: one cluster a folder, and a record whose supervisor is gone does not count."""

import json
import os
from pathlib import Path

import pytest
from ralmq.cluster.record import RECORD, holding, running, state_directory, write
from ralmq.errors import Refused


def test_the_state_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state_directory() == tmp_path / "state" / "ralmq" / "local"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_directory() == tmp_path / ".local" / "state" / "ralmq" / "local"


def test_nothing_runs_where_nothing_was(tmp_path: Path) -> None:
    assert running(tmp_path / "never") is None
    assert running(tmp_path) is None


def test_a_record_lives_as_long_as_its_supervisor(tmp_path: Path) -> None:
    with holding(tmp_path):
        assert running(tmp_path) == {"pid": os.getpid(), "url": "", "ready": False, "processes": []}
        write(tmp_path, {"pid": os.getpid(), "url": "tcp://127.0.0.1:1", "ready": True, "processes": []})
        found = running(tmp_path)
        assert found is not None and found["ready"]
        with (
            pytest.raises(Refused, match=r"up already at tcp://127.0.0.1:1: end it with `ralmq down`"),
            holding(tmp_path),
        ):
            pass
        assert running(tmp_path) == found
    assert running(tmp_path) is None
    assert not (tmp_path / RECORD).exists()


def test_a_stale_record_is_removed_whatever_its_pid(tmp_path: Path) -> None:
    write(tmp_path, {"pid": os.getpid(), "url": "tcp://127.0.0.1:1", "ready": True, "processes": []})
    assert running(tmp_path) is None
    assert not (tmp_path / RECORD).exists()
    with holding(tmp_path):
        assert running(tmp_path) is not None


def test_a_record_is_json_for_others_too(tmp_path: Path) -> None:
    record = {"pid": 1, "url": "u", "ready": True, "processes": [{"name": "broker", "pid": 2, "log": "l"}]}
    write(tmp_path, record)
    assert json.loads((tmp_path / RECORD).read_text()) == record
