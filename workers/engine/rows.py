"""Sampling and log-probabilities of many rows at once. Knows arrays, no sequence and no message."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .logits import History
from .sample import Floats, Ids, Logits, SamplingParams, choose, probabilities

NO_LOGITS = "its logits are not finite: the head's weights may be damaged, or the dtype too narrow"
AT_ONCE = 64  # rows whose logits are copied together: a copy of all of a long text is large


def sample_rows(
    logits: Logits | Floats,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    histories: Sequence[History] = (),
) -> tuple[list[int], list[float | None]]:
    """One token for each row of logits [m, vocab], and its log-probability where the row's parameters ask for it.

    Log-probabilities are of the logits as they came. `histories`, one a row where given, bring bias, minimum length and
    penalties. Greedy rows need no softmax and give what `choose` gives.

    Raises:
        ValueError: the largest logit of a row is no number, or not finite.
    """
    tokens = logits.argmax(axis=1)
    if not np.isfinite(logits[np.arange(len(tokens)), tokens]).all():  # argmax finds a NaN, too
        raise ValueError(NO_LOGITS)
    adjusted: dict[int, Logits | Floats] = {}
    for i, history in enumerate(histories):
        row = logits[i]  # one view: `adjusted` gives back what it was given where there is nothing to do
        if (changed := history.adjusted(row)) is not row:
            adjusted[i] = changed
    for i, row in adjusted.items():
        tokens[i] = row.argmax()
    drawn = [i for i, row in enumerate(params) if row.temperature > 0.0]
    for begin in range(0, len(drawn), AT_ONCE):
        some = drawn[begin : begin + AT_ONCE]
        rows = logits[some]  # a copy
        for place, i in enumerate(some):
            if i in adjusted:
                rows[place] = adjusted[i]
        for i, p in zip(some, probabilities(rows), strict=True):
            tokens[i] = choose(p, params[i], positions[i])
    chosen: list[float | None] = [None] * len(params)
    asked = [i for i, row in enumerate(params) if row.logprobs]
    if asked:
        for i, value in zip(asked, log_probs_of(logits[asked], tokens[asked]), strict=True):
            chosen[i] = float(value)
    return [int(token) for token in tokens], chosen


def log_probs_of(logits: Logits | Floats, targets: Ids | NDArray[np.int32]) -> NDArray[np.floating]:
    """log p of targets [n] under the softmax of logits [n, vocab], in the dtype of the logits."""
    result = np.empty(len(targets), dtype=logits.dtype)
    for start in range(0, len(targets), AT_ONCE):
        rows, wanted = logits[start : start + AT_ONCE], targets[start : start + AT_ONCE]
        result[start : start + AT_ONCE] = rows[np.arange(len(wanted)), wanted] - normalizers(rows)
    return result


def top_log_probs(logits: Logits | Floats, count: int) -> tuple[NDArray[np.int32], NDArray[np.floating]]:
    """The `count` most probable ids of each row of logits [n, vocab] and their log p, both [n, count].

    In the order (log p descending, id); at most as many as the vocabulary has.
    """
    count = min(count, logits.shape[1])
    ids = np.empty((len(logits), count), np.int32)
    values: NDArray[np.floating] = np.empty((len(logits), count), logits.dtype)
    for place, row in enumerate(logits):
        threshold = np.partition(row, len(row) - count)[len(row) - count]
        near = np.flatnonzero(row >= threshold)
        ids[place] = near[np.argsort(-row[near], kind="stable")][:count]
    for start in range(0, len(logits), AT_ONCE):
        rows, some = logits[start : start + AT_ONCE], ids[start : start + AT_ONCE]
        lines = np.arange(len(some))[:, None]
        values[start : start + AT_ONCE] = rows[lines, some] - normalizers(rows)[:, None]
    return ids, values


def normalizers(logits: Logits | Floats) -> Floats:
    """log of the sum of exp over the last dimension of [n, vocab], summed in float64: logits minus this are log p."""
    top = logits.max(axis=1, keepdims=True)
    found: Floats = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
    return found
