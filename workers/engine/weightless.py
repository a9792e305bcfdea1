"""A model of transformers' own without its weights: buffers are there, parameters are on the meta device. Knows no
checkpoint.

Nothing of the process is changed for it. transformers would make torch's default dtype the model's while it builds,
and torch's hooks are run through without a lock: either harms what another thread makes at that moment.
"""

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


class _Building(threading.local):
    """The dtype of the model that this thread builds; None while it builds none."""

    dtype: torch.dtype | None = None


_building = _Building()


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    dtype = _building.dtype
    if parameter is None or dtype is None:  # the hook is of all threads
        return None
    return nn.Parameter(parameter.to("meta", dtype if parameter.is_floating_point() else parameter.dtype))


register_module_parameter_registration_hook(_to_meta)  # once and for all


def without_weights(described: Any, dtype: torch.dtype) -> Any:
    """The language model of a config of transformers, in eval mode.

    Each parameter goes to the meta device, in `dtype`, as soon as it is made, so that buffers (rotary frequencies,
    slopes) hold what the architecture computes for them and no memory is taken for more than one layer's weights.

    Raises:
        ValueError, KeyError: transformers has no language model for it.
    """
    from transformers import AutoModelForCausalLM

    _building.dtype = dtype
    try:
        model = AutoModelForCausalLM.from_config(described, dtype=None).eval()
    finally:
        _building.dtype = None
    model.config.dtype = dtype
    return model
