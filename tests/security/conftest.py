"""The tests here are coroutines, and leave nothing open; some have a folder of keys."""

from pathlib import Path

import pytest
from commands import ralmq
from leaks import pytest_pyfunc_call, warm

__all__ = ["keys", "pytest_pyfunc_call", "warm"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """What `ralmq keys init` makes, by a process of its own."""
    folder = tmp_path / "keys"
    made = ralmq("keys", "init", str(folder), home=tmp_path)
    assert made.returncode == 0, made.stderr
    return folder
