"""The tests here share the samples of tests/schema; those with sockets are coroutines and leave nothing open."""

import sys
from pathlib import Path

from hypothesis.configuration import set_hypothesis_home_dir
from leaks import pytest_pyfunc_call, warm

__all__ = ["pytest_pyfunc_call", "warm"]

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "schema"))
set_hypothesis_home_dir(ROOT / ".cache" / "hypothesis")
