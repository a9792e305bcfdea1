"""The demo's numbers: bits per byte of a held-out text, lambda and temperature chosen on another. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..client.results import Token
from ..workers.datastore.evaluate import HeldOut, Neighbours, knn_bits, model_bits, trigram_bits
from ..workers.datastore.ngram import Trigram

LAMBDAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TEMPERATURES = (1.0, 3.0, 10.0, 30.0, 100.0)


class Pair(NamedTuple):
    """The neighbours of the development text and those of the held-out text, from one index."""

    development: Neighbours
    held_out: Neighbours

    def shuffled(self) -> Pair:
        return Pair(self.development.shuffled(), self.held_out.shuffled())


@dataclass(frozen=True, slots=True)
class Row:
    """One way to predict the held-out text.

    Attributes:
        bits: per byte of it.
        tokens: in the store that was used.
        lam, temperature: chosen on the development text; None where there is none, or where it makes no difference.
    """

    name: str
    bits: float
    tokens: int | None = None
    lam: float | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Slices:
    """Two scored texts: lambda and temperature are chosen on one, the numbers are the other's."""

    development: HeldOut
    held_out: HeldOut


def alone(slices: Slices) -> Row:
    return Row("model alone", model_bits(slices.held_out))


def knn(name: str, slices: Slices, pair: Pair, tokens: int) -> Row:
    """kNN-LM with the best lambda and temperature of the grid; lambda 0 is the model alone."""

    def on_development(choice: tuple[float, float]) -> float:
        return knn_bits(slices.development, pair.development, lam=choice[0], temperature=choice[1])

    lam, temperature = min(((a, b) for a in LAMBDAS for b in TEMPERATURES), key=on_development)
    bits = knn_bits(slices.held_out, pair.held_out, lam=lam, temperature=temperature)
    return Row(name, bits, tokens, lam, temperature if lam else None)


def trigram(name: str, slices: Slices, table: Trigram, tokens: int) -> Row:
    """The model mixed with a trigram table, with the best lambda of the grid."""
    lam = min((*LAMBDAS, 1.0), key=lambda lam: trigram_bits(slices.development, table, lam=lam))
    return Row(name, trigram_bits(slices.held_out, table, lam=lam), tokens, lam)


def meaning(rows: Sequence[Row]) -> str:
    """What the five rows say, in a sentence or two; whatever they say."""
    model, near, shuffled, other, table = (row.bits for row in rows)
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
        text += " A plain trigram table of the same text does better still: this model is small, and knows other texts."
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
