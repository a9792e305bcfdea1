"""The next tokens from logits, by operators alone: local tensors and remote ones do. Knows no model."""

from typing import Any

import torch

from ...schema.errors import Refused


def check(temperature: float, top_k: int, top_p: float) -> None:
    """Raises Refused for settings by which nothing can be chosen."""
    if not 0 <= temperature < float("inf") or (temperature and not 1 / temperature < float("inf")):
        raise Refused(f"temperature={temperature}: give 0 for the most likely token, or more")
    if type(top_k) is not int or top_k < 0:
        raise Refused(f"top_k={top_k}: give 0 for all tokens, or how many")
    if not 0 < top_p <= 1:
        raise Refused(f"top_p={top_p}: give more than 0, 1 at most")


def choose(logits: Any, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, draws: Any = None) -> Any:
    """Token ids [b] of logits [b, vocab].

    Args:
        temperature: 0 takes the most likely one.
        top_k: of so many most likely ones; 0 of all.
        top_p: of the most likely ones whose probabilities come to this, the one that passes it among them.
        draws: uniform numbers in [0, 1), float64 [b, 1]: the inverse of the distribution's sum is taken there.
    """
    if not temperature:
        return logits.argmax(dim=-1)
    scores = logits.double() / temperature
    values, ids = scores.topk(top_k, dim=-1) if top_k else scores.sort(dim=-1, descending=True, stable=True)
    kept = torch.softmax(values, dim=-1)
    if top_p < 1:
        kept = kept * ((kept.cumsum(dim=-1) - kept) < top_p)
    passed = kept.cumsum(dim=-1)
    places = (passed <= passed[:, -1:] * draws).sum(dim=-1, keepdim=True)
    return ids.gather(-1, places).squeeze(-1)
