"""Which KV blocks are free, and how many tokens one holds. Knows ids alone: no tensor, no torch."""

from collections.abc import Iterable

BLOCK = 16  # tokens


class BlockPool:
    """Which of `blocks` block ids are free; low ids first."""

    def __init__(self, blocks: int) -> None:
        self._free = list(range(blocks - 1, -1, -1))
        self._taken = [False] * blocks

    @property
    def available(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def take(self, n: int) -> list[int] | None:
        """`n` block ids, or None (and nothing taken) where fewer are free."""
        if n > len(self._free):
            return None
        ids = [self._free.pop() for _ in range(n)]
        for block in ids:
            self._taken[block] = True
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Gives blocks back; ValueError for a block that is not taken."""
        for block in ids:
            if not 0 <= block < len(self._taken) or not self._taken[block]:
                raise ValueError(f"block {block} is not taken")
            self._taken[block] = False
            self._free.append(block)
