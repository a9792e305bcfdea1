"""How long work tells how far it is. Knows no display."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, what is done and the total, perhaps from another thread."""


def silent(stage: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""
