"""Texts into passages of so many words. Knows strings alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

WORDS: Final = 100  # of a passage
OVERLAP: Final = 20  # words that a passage shares with the one before
_WORD: Final = re.compile(r"\S{1,64}")  # a longer run of characters counts as several words, so that passages are short


class Passage(NamedTuple):
    """A piece of a document: `text` is document[start : start + len(text)]."""

    start: int
    text: str


def passages(document: str, words: int = WORDS, overlap: int = OVERLAP) -> Iterator[Passage]:
    """The passages of a document; the last is the shorter one. A document without a word has none.

    Raises ValueError unless 0 <= overlap < words.
    """
    if not 0 <= overlap < words:
        raise ValueError(f"passages of {words} words cannot overlap by {overlap}")
    places = [found.span() for found in _WORD.finditer(document)]
    for first in range(0, max(len(places) - overlap, min(1, len(places))), words - overlap):
        start, end = places[first][0], places[min(first + words, len(places)) - 1][1]
        yield Passage(start, document[start:end])
