"""The tests here are coroutines, and leave nothing open."""

from leaks import pytest_pyfunc_call, warm

__all__ = ["pytest_pyfunc_call", "warm"]
