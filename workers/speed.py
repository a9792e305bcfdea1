"""How fast a device of this machine reads weights: a matrix-vector product by the clock. Knows no model."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

SIDE: Final = 4096  # rows and columns of the fp32 matrix: 64 MiB, beyond every cache
TIMES: Final = 15


def measured(device: str = "cpu") -> float:
    """GB (1e9 bytes) of weights that a device reads in a second for one token; takes about 0.2 s.

    On the CPU with the threads that this process's BLAS has (OMP_NUM_THREADS), on others with torch. Decoding one token
    multiplies each weight once, so this bounds tokens/s (the memory wall: Pope et al. 2022, "Efficiently scaling
    transformer inference").
    """
    product = _on_cpu() if device == "cpu" else _with_torch(device)
    product()
    return SIDE * SIDE * 4 / statistics.median(_seconds(product) for _ in range(TIMES)) / 1e9


def _seconds(product: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    product()
    return time.perf_counter() - begun


def _on_cpu() -> Callable[[], Any]:
    matrix, vector = np.ones((SIDE, SIDE), np.float32), np.ones(SIDE, np.float32)
    return lambda: matrix @ vector


def _with_torch(device: str) -> Callable[[], Any]:
    import torch

    matrix, vector = torch.ones(SIDE, SIDE, device=device), torch.ones(SIDE, device=device)
    return lambda: float(torch.mv(matrix, vector)[0])  # its value is waited for
