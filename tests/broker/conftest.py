"""The tests here that are coroutines leave nothing open."""

from leaks import pytest_pyfunc_call, warm

__all__ = ["pytest_pyfunc_call", "warm"]
