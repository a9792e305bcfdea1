"""The demo's numbers: bits per byte of a held-out text, weights chosen on a part of it. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..client.results import Token
from ..workers.datastore.evaluate import HeldOut, Neighbours
from ..workers.datastore.knn_eval import knn_target_probability
from ..workers.datastore.ngram import Trigram

Floats = NDArray[np.float64]
Way = tuple[tuple[float, float, float], Floats]
SEEDS = (0, 1, 2)  # of the draws
LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TEMPERATURES = (1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One way to predict the held-out text, over several draws of what is held out for the choice of weights.

    Attributes:
        bits: per byte of the rest, the mean over the draws; `spread` is the largest less the smallest.
        tokens: in the store that was used.
        lam, temperature, ngram: weight and temperature of the neighbours and weight of the n-grams, the median of what
            was chosen; None where there is none, or where it makes no difference.
    """

    name: str
    bits: float
    spread: float = 0.0
    tokens: int | None = None
    lam: float | None = None
    temperature: float | None = None
    ngram: float | None = None


class Text:
    """A scored text, of which each draw keeps about a third of the documents to choose weights on."""

    def __init__(self, held: HeldOut) -> None:
        scored = held.scored
        self._targets = scored.targets
        self._p = np.exp(scored.logp.astype(np.float64))
        self._documents = scored.stream.documents_of(scored.entries)
        self._bytes = np.array(held.document_bytes)
        self._contexts = scored.contexts

    def alone(self, name: str) -> Row:
        """The model as it is."""
        return self._row(name, None, [self._ways(None, None) for _ in SEEDS], False, False)

    def mixed(
        self,
        name: str,
        tokens: int,
        neighbours: Callable[[int], Neighbours] | None = None,
        table: Trigram | None = None,
    ) -> Row:
        """With the neighbours that belong to a seed, with a table's p, or with both: with the best of all weights."""
        counts = None if table is None else table.probability(self._contexts, self._targets)
        draws = [self._ways(neighbours(seed) if neighbours is not None else None, counts) for seed in SEEDS]
        return self._row(name, tokens, draws, neighbours is not None, table is not None)

    def _ways(self, near: Neighbours | None, counts: Floats | None) -> Iterator[Way]:
        """(lambda, temperature, weight of the n-grams), and p of each target with them."""
        shares = (0.0,) if counts is None else (*LAMBDAS, 1.0)
        for temperature in (0.0,) if near is None else TEMPERATURES:
            p_near = self._p if near is None else self._of(near, temperature)
            for lam in (0.0,) if near is None else LAMBDAS:
                for share in shares:
                    if lam + share <= 1.0 + 1e-9:
                        p = (1.0 - lam - share) * self._p + lam * p_near
                        yield (lam, temperature, share), p if counts is None else p + share * counts

    def _of(self, near: Neighbours, temperature: float) -> Floats:
        """Where nothing was found the model speaks alone."""
        p = knn_target_probability(near.distances, near.values, self._targets, temperature)
        return np.where((near.values >= 0).any(axis=1), p, self._p)

    def _row(self, name: str, tokens: int | None, draws: Sequence[Iterator[Way]], near: bool, counts: bool) -> Row:
        bits, chosen = [], []
        for seed, ways in zip(SEEDS, draws, strict=True):
            development = self._drawn(seed)
            found = ((self._bits(p, development), choice, p) for choice, p in ways)
            _, choice, p = min(found, key=lambda way: way[0])
            bits.append(self._bits(p, ~development))
            chosen.append(choice)
        lam, temperature, share = (float(value) for value in np.median(np.array(chosen), axis=0))
        weights = lam if near else None, temperature if lam else None, share if counts else None
        return Row(name, float(np.mean(bits)), max(bits) - min(bits), tokens, *weights)

    def _drawn(self, seed: int) -> NDArray[np.bool_]:
        """The documents to choose on: some of the text, and never all of it."""
        order = np.random.default_rng(seed).permutation(len(self._bytes))
        least = self._bytes[order].cumsum() - self._bytes[order] < self._bytes.sum() / 3
        least[-1] = False
        drawn = np.zeros(len(order), np.bool_)
        drawn[order[least]] = True
        return drawn

    def _bits(self, p: Floats, documents: NDArray[np.bool_]) -> float:
        """Per byte of these documents."""
        with np.errstate(divide="ignore"):
            return float(-np.log2(p[documents[self._documents]]).sum() / max(1, self._bytes[documents].sum()))


def meaning(rows: Sequence[Row]) -> str:
    """What the six rows say, in a sentence or two; whatever they say."""
    model, near, shuffled, other, table, both = (row.bits for row in rows)
    gain, control = 1 - near / model, max(1 - shuffled / model, 1 - other / model)
    if gain < 0.01:
        text = "Retrieval does not help on this text: the model alone does as well."
    elif control < gain / 4:
        text = (
            f"Retrieval saves {gain:.0%} of the bits, the controls at most {max(control, 0):.1%}: what helps is what "
        )
        text += "the documents say, not that there are some."
    else:
        text = (
            f"Retrieval saves {gain:.0%} of the bits, but a control saves {control:.1%}: only the difference is owed "
        )
        text += "to what the documents say."
    if table < min(near, model):
        text += " Plain n-gram counts of the same text do better still: this model is small, and knows other texts."
    if both < 0.99 * min(near, table, model):
        text += f" Both together save {1 - both / model:.0%}."
    return text


class Used(NamedTuple):
    """A document that retrieval drew on: how many of the generated tokens, and the nearest passage of it."""

    document: str
    tokens: int
    distance: float
    context: str
    continuation: str


def used(tokens: Sequence[Token]) -> list[Used]:
    """The documents one of whose passages went on with the token that was generated, most used first."""
    found: dict[str, Used] = {}
    for token in tokens:
        seen: set[str] = set()
        for passage in token.passages:
            name = passage["document"]
            if not token.text or not passage["continuation"].startswith(token.text):
                continue
            known = found.get(name)
            count = (known.tokens if known else 0) + (name not in seen)
            seen.add(name)
            if known is None or passage["distance"] < known.distance:
                known = Used(name, count, passage["distance"], passage["context"], passage["continuation"])
            found[name] = known._replace(tokens=count)
    return sorted(found.values(), key=lambda one: (-one.tokens, one.distance))
