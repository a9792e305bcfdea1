"""Which tensors belong to which layers of a model, and to its two ends; reads none of them. Knows no torch."""

import re
from dataclasses import dataclass

from .headers import Headers
from .model import ADAPTER, ModelConfig
from .names import HEAD, NAMES, prefix_of


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of tensors: of each layer, of the first span (embedding), of the last (norm and head), of every span.

    A name may be in several of them: a tied embedding is in `first` and `last`.
    """

    layers: list[list[str]]
    first: list[str]
    last: list[str]
    each: list[str]


def even_cuts(layers: int, stages: int) -> list[tuple[int, int]]:
    """First and last (exclusive) layer of each stage of an even split."""
    return [(place * layers // stages, (place + 1) * layers // stages) for place in range(stages)]


def parts_of(checkpoint: Headers, config: ModelConfig) -> Parts:
    """The tensors of a model by where they are needed.

    Of a family without blocks of ours the first and the last span get every tensor that is in no layer.
    """
    layers: list[list[str]] = [[] for _ in range(config.layers)]
    everything = checkpoint.names()
    if config.family == ADAPTER:
        ends = []
        for name in everything:
            number = _layer_of(name)
            if number is None:
                ends.append(name)
            elif number < config.layers:
                layers[number].append(name)
        return Parts(layers, ends, ends, [])
    names = NAMES[config.family]
    prefix = prefix_of(checkpoint, names)
    before, after = (prefix + names.layer).split("{}")
    for name in everything:
        number_text, dot, _ = name.removeprefix(before).partition(after)
        if name.startswith(before) and dot and number_text.isdecimal() and int(number_text) < config.layers:
            layers[int(number_text)].append(name)
    first = (prefix + names.embedding, *([prefix + names.positions] if names.positions else []))
    tied = config.tied and HEAD not in everything  # a head that is there is used whatever the config says
    last = [f"{prefix}{names.final_norm}.", prefix + names.embedding if tied else HEAD]

    def beginning(starts: tuple[str, ...]) -> list[str]:
        return [name for name in everything if name.startswith(starts)]

    return Parts(layers, beginning(first), beginning(tuple(last)), beginning(names.everywhere))


def span_tensors(checkpoint: Headers, config: ModelConfig, first: int, last: int) -> list[str]:
    """Names of the tensors that layers `first` to `last` - 1 need, sorted, with the ends where they have them."""
    parts = parts_of(checkpoint, config)
    found = {name for layer in parts.layers[first:last] for name in layer} | set(parts.each)
    found.update(parts.first if first == 0 else (), parts.last if last == config.layers else ())
    return sorted(found)


def _layer_of(name: str) -> int | None:
    """The first number between dots, which is the layer's in every naming that transformers has."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None
