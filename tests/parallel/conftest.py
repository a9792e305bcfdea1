"""One torch thread for every test, and tests that are coroutines."""

import pytest
import torch
from leaks import pytest_pyfunc_call, warm

__all__ = ["pytest_pyfunc_call", "warm"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
