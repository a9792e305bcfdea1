"""Hidden states as they travel between stages: as they are, or in fewer bytes where a link is slow."""

from typing import Final

import torch

from ...schema.errors import Refused

WIRES: Final = ("raw", "fp16", "int8")
BLOCK: Final = 64  # values that share a scale
_SCALE: Final = 4  # bytes


def check_wire(name: str) -> str:
    """Raises Refused for a name that is none of WIRES."""
    if name not in WIRES:
        raise Refused(f"wire={name} is unknown: give one of {', '.join(WIRES)}")
    return name


def narrowed(hidden: torch.Tensor, wire: str) -> torch.Tensor:
    """Hidden states [n, d] to send.

    fp16 has 11 bits of each value (bf16, 8, is further off: 6e-3 against 8e-4 in logits); what it cannot hold is cut to
    its largest. int8: of each 64 values whole numbers from -127 to 127 times a float32 scale, the largest / 127,
    as int8 [n, d rounded up to 64s + 4 bytes of scale each].
    """
    if wire == "fp16":
        largest = torch.finfo(torch.float16).max
        if hidden.dtype == torch.float16:
            return hidden
        # What is not finite stays so: its row fails at the last stage.
        return torch.where(hidden.isinf(), hidden, hidden.clamp(-largest, largest)).to(torch.float16)
    if wire == "int8":
        padding = -hidden.shape[1] % BLOCK
        blocks = torch.nn.functional.pad(hidden.float(), (0, padding)).reshape(len(hidden), -1, BLOCK)
        scales = blocks.abs().amax(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        whole = torch.round(blocks / scales).to(torch.int8)
        return torch.cat([whole.flatten(1), scales.flatten(1).contiguous().view(torch.int8)], dim=1)
    return hidden


def widened(values: torch.Tensor, width: int) -> torch.Tensor:
    """Received hidden states [n, width], float32 where they came as int8, else as they came.

    Raises:
        ValueError: int8 of another shape than `narrowed` gives.
    """
    if values.dtype != torch.int8:
        return values
    count = -(-width // BLOCK)
    if values.shape[1] != count * (BLOCK + _SCALE):
        raise ValueError(f"hidden states of {values.shape[1]} bytes a token are no int8 of {width} values")
    scales = values[:, count * BLOCK :].contiguous().view(torch.float32)
    whole: torch.Tensor = values[:, : count * BLOCK].float().reshape(len(values), -1, BLOCK) * scales[:, :, None]
    return whole.flatten(1)[:, :width]
