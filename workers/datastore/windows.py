"""How a token stream is cut into pieces that a model's context holds. Knows offsets alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..index.stream import TokenStream


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start:stop of a stream, sent together; the first `keep` positions are context that another window scores.

    The positions that count are keep ... stop - start - 2: the last token is a target only.
    """

    start: int
    stop: int
    keep: int

    @property
    def count(self) -> int:
        """How many positions this window scores for good."""
        return self.stop - self.start - 1 - self.keep


def windows(stream: TokenStream, size: int, overlap: int) -> Iterator[Window]:
    """Windows of at most `size` tokens that score each entry of `stream` once, `overlap` tokens of context before it.

    Only positions near a document's beginning have less to their left. Raises ValueError unless 0 <= overlap <=
    size - 2.
    """
    if not 0 <= overlap <= size - 2:
        raise ValueError(f"windows of {size} tokens cannot overlap by {overlap}")
    for begin, end in zip(stream.starts.tolist(), stream.ends.tolist(), strict=True):
        start, keep = begin, 0
        while end - start - 1 > keep:
            stop = min(start + size, end)
            yield Window(start, stop, keep)
            start, keep = stop - 1 - overlap, overlap
