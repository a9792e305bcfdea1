"""What changes logits before a draw: bias, minimum length and penalties, in the order of docs/sampling.md.

Plain numpy; knows one sequence at a time: its tokens so far and how often each occurs.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .sample import Floats, Ids, Logits, SamplingParams

Tokens = NDArray[np.int32]


class History:
    """The tokens of one sequence, and what they do to the logits of the next one.

    Args:
        tokens: known so far, the prompt first.
        start: how many of them are the prompt; those behind it are output (a replay brings both).
        stops: ids that would end the text; not before `min_tokens` of output.
    """

    def __init__(
        self, params: SamplingParams, tokens: NDArray[np.integer], start: int, stops: Sequence[int] = ()
    ) -> None:
        self._params = params
        self._start = start
        self._buffer = np.empty(2 * len(tokens) + 64, np.int32)
        self._buffer[: len(tokens)] = tokens
        self._length = len(tokens)
        bias = dict(params.logit_bias)
        self._biased = np.fromiter(bias, np.int64, len(bias)), np.fromiter(bias.values(), np.float64, len(bias))
        self._stops = np.asarray(sorted(stops), np.int64)
        self._seen = Tally(tokens) if params.repetition_penalty != 1.0 else None
        counts = params.presence_penalty or params.frequency_penalty
        self._made = Tally(tokens[start:]) if counts else None

    @property
    def tokens(self) -> Tokens:
        """Prompt and output so far, int32 [n]; to be read, not changed."""
        view = self._buffer[: self._length]
        view.flags.writeable = False
        return view

    @property
    def adjusts(self) -> bool:
        """Whether the logits of the next token are changed at all."""
        return bool(len(self._biased[0]) or self._seen or self._made or self._early)

    @property
    def _early(self) -> bool:
        """An end of the text would come too early."""
        return len(self._stops) > 0 and self._length - self._start < self._params.min_tokens

    def add(self, token: int) -> None:
        """A token was sampled."""
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = token
        self._length += 1
        for tally in (self._seen, self._made):
            if tally is not None:
                tally.add(token)

    def adjusted(self, logits: Logits | Floats) -> Logits | Floats:
        """Logits [vocab] of the next token after bias, penalties and the ban of an early end; a copy where they differ.

        Repetition divides positive logits of tokens of prompt and output, and multiplies negative ones (Keskar et al.
        2019, as transformers); frequency is subtracted for each occurrence in the output, presence once (as OpenAI).
        """
        params, (biased, bias) = self._params, self._biased
        if not self.adjusts:
            return logits
        out = logits.copy()
        out[biased] += bias.astype(out.dtype)
        if self._seen is not None:
            ids = self._seen.ids
            found = out[ids]
            penalty = out.dtype.type(params.repetition_penalty)
            out[ids] = np.where(found < 0, found * penalty, found / penalty)
        if self._made is not None:
            ids, counts = self._made.ids, self._made.counts
            out[ids] -= (params.frequency_penalty * counts + params.presence_penalty).astype(out.dtype)
        if self._early:
            kept = out[self._stops]
            out[self._stops] = -np.inf
            if out.max() == -np.inf:  # a hook has left nothing else: better an early end than none
                out[self._stops] = kept
        return out


class Tally:
    """How often each token occurs; ids and counts as arrays that grow."""

    def __init__(self, tokens: NDArray[np.integer]) -> None:
        ids, counts = np.unique(tokens, return_counts=True)
        self._place = {int(token): place for place, token in enumerate(ids)}
        self._ids = np.concatenate([ids.astype(np.int64), np.empty(64, np.int64)])
        self._counts = np.concatenate([counts.astype(np.int64), np.zeros(64, np.int64)])

    @property
    def ids(self) -> Ids:
        """Each token once."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> Ids:
        """Its occurrences."""
        return self._counts[: len(self._place)]

    def add(self, token: int) -> None:
        """One occurrence more."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1
