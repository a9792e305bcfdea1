"""To a device and back: pinned memory and copies that nobody waits for where there is CUDA, plain copies elsewhere."""

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers, or a tensor in the host's memory, as a tensor on `device`. The host does not wait for the copy.

    torch reuses a pinned buffer only once the copy out of it is done.
    """
    if device.type != "cuda":
        return values.to(device) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype, device=device)
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=dtype, pin_memory=True)
    elif values.device.type == "cpu":
        values = values.pin_memory()
    moved: Tensor = values.to(device, non_blocking=True)
    return moved


def fetch(values: Tensor) -> Tensor:
    """The values in the host's memory. On CUDA the host waits until all that was asked of the stream is done."""
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return host
