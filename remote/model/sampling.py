"""The next tokens from logits, by operators alone: local tensors and remote ones do. Knows no model."""

from typing import Any

import torch


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
