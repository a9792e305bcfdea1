"""Sampling of many rows at once where their logits are, on any device. Knows tensors, no sequence and no message.

The definition is `choose` of sample.py, and so are the random numbers; sums are in float64 but in another order, so
that a draw within about 1e-12 of the boundary between two tokens may fall to the other one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .device import upload
from .sample import SamplingParams, uniform


def draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """For each row of logits [m, vocab] its token and the token's log-probability under the logits as they are.

    float64 [m, 2] on the device of the logits, which holds ids of any vocabulary exactly. The host waits for nothing.
    """
    wide = logits.double()
    top = wide.amax(1, keepdim=True)
    ids = torch.arange(logits.shape[1], device=logits.device)
    # The lowest id among equals, which argmax leaves open; one that is there where logits are not numbers.
    tokens = torch.where(wide == top, ids, logits.shape[1] - 1).amin(1)
    drawn = [row for row, some in enumerate(params) if some.temperature > 0.0 and some.top_k != 1]
    if drawn:
        places = upload(drawn, logits.device)
        some = [params[row] for row in drawn]
        tokens[places] = _drawn(wide[places] - top[places], some, [positions[row] for row in drawn])
    log_p = wide.gather(1, tokens[:, None]) - wide.logsumexp(1, keepdim=True)
    return torch.cat((tokens.double()[:, None], log_p), 1)


def _drawn(scores: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Tokens [m] from scores [m, vocab], logits less the largest."""
    vocab = scores.shape[1]
    numbers = [
        (
            row.temperature,
            row.min_p,
            row.top_p,
            float(row.top_k or vocab),
            uniform(row.seed, position),
        )
        for row, position in zip(params, positions, strict=True)
    ]
    temperature, min_p, top_p, top_k, u = upload(numbers, scores.device, torch.float64).split(1, 1)
    weights = (scores / temperature).exp()
    weights = weights.masked_fill(weights < min_p, 0.0)  # the largest is 1
    weights, order = weights.sort(dim=1, descending=True, stable=True)  # among equals the lowest id first
    weights = weights.masked_fill(torch.arange(vocab, device=scores.device) >= top_k, 0.0)
    upto = weights.cumsum(1)
    total = upto[:, -1:]
    # Of what is left the fewest that hold at least that share; all of it where top_p is 1.
    kept = upto.gather(1, torch.searchsorted(upto, top_p * total).clamp_max(vocab - 1))
    total = torch.where(top_p < 1.0, kept, total)
    share = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))  # u * total may round up
    place = torch.searchsorted(upto, share, right=True).clamp_max(vocab - 1)
    tokens: Tensor = order.gather(1, place)[:, 0]
    return tokens
