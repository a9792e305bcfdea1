"""What the last stage samples on its device, before the host has seen a logit. Knows rows and sequences, no message.

Where logits lie on an accelerator, the next tokens of all rows that nothing but the model decides are drawn there, and
come to the host in one copy, together with which rows are not finite: the one time that the host waits in a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch

from ...schema.message import Row
from ..engine.device import fetch, upload
from ..engine.draw import draw
from ..engine.span import Span
from .batch import Key
from .sequence import Sequence


@dataclass(slots=True)
class Ahead:
    """finite: of each row, whether all of its hidden states are. drawn: token and log p of rows, by sequence."""

    finite: "np.ndarray[Any, Any]"
    drawn: dict[Key, tuple[int, float]] = field(default_factory=dict)

    def body(self, sequence: Sequence) -> dict[str, Any]:
        """What the PARTIAL of a drawn token says."""
        token, log_p = self.drawn[sequence.key]
        body: dict[str, Any] = {"token": token, "position": sequence.told(sequence.total)}
        return {**body, "logprob": log_p} if sequence.sampling.logprobs else body


def finite_rows(rows: tuple[Row, ...], hidden: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Of each row, whether all of its hidden states are finite; hidden [sum of lengths, d] is in the host's memory."""
    finite = torch.isfinite(hidden).all(1)
    if finite.all():
        return np.ones(len(rows), bool)
    return np.array([bool(part.all()) for part in torch.split(finite, [row.length for row in rows])])


def plain(sequence: Sequence, row: Row) -> bool:
    """Whether the next token of this row follows from its logits and its random number alone, and is due now."""
    task, sampling = sequence.task, sequence.sampling
    if task.mode == "score" or task.hooks or sampling.top_logprobs or not sequence.ends(row):
        return False
    if sequence.due(sequence.total) >= 0:
        return False
    return not sequence.history.adjusts


def ahead(span: Span, rows: tuple[Row, ...], hidden: torch.Tensor, sequences: Mapping[Key, Sequence]) -> Ahead:
    """Draws what can be drawn of a step. `hidden` is the output of the last layer, [sum of lengths, d]."""
    ends = np.cumsum([row.length for row in rows])
    found = [
        (sequence, int(end) - 1)
        for row, end in zip(rows, ends, strict=True)
        if (sequence := sequences.get((row.id, row.attempt))) is not None and plain(sequence, row)
    ]
    broken = (~torch.isfinite(hidden).all(1)).double().cumsum(0)
    upto = broken.index_select(0, upload((ends - 1).tolist(), hidden.device))
    if not found:
        return Ahead(_rows(fetch(upto)))
    logits = span.head(hidden, [place for _, place in found])
    params = [sequence.sampling for sequence, _ in found]
    made = draw(logits, params, [sequence.told(sequence.total) for sequence, _ in found])
    host = fetch(torch.cat((upto, made.flatten())))
    values = host[len(rows) :].view(-1, 2).tolist()
    drawn = {
        sequence.key: (int(token), log_p)
        for (sequence, _), (token, log_p) in zip(found, values, strict=True)
        if isfinite(log_p)  # the host says what is wrong with the others
    }
    return Ahead(_rows(host[: len(rows)]), drawn)


def _rows(upto: torch.Tensor) -> "np.ndarray[Any, Any]":
    """From how many tokens up to each row's end are not finite to which rows are."""
    finite: np.ndarray[Any, Any] = np.diff(upto.numpy(), prepend=0.0) == 0.0
    return finite
