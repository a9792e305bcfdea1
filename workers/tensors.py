"""Tensors from the wire as torch tensors. Imported only where models are."""

import warnings

import numpy as np
import torch

from ..schema.tensor import DTYPES, Tensor


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The values as a torch tensor of the same dtype; shares the received bytes, which must not be written to."""
    flat = np.frombuffer(tensor.buffer, dtype=DTYPES[tensor.dtype][0])
    if not flat.flags.aligned:
        flat = flat.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the memory is read-only: nobody writes to it
        values = torch.from_numpy(flat)
    if tensor.dtype == "bf16":
        values = values.view(torch.bfloat16)
    return values.reshape(tensor.shape)
