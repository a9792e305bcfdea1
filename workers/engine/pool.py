"""Who holds which KV block, and which blocks hold tokens that may be found again. Knows ids and keys: no tensor."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK = 16  # tokens


class BlockPool:
    """Which of `blocks` block ids are held, by how many, and what the full ones hold.

    A block that was named keeps its content when its last holder frees it, until it is taken for something else; that
    is the prefix cache. What was freed longest ago is taken first, blocks without a name before all others.
    """

    def __init__(self, blocks: int) -> None:
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._holders = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._named: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    @property
    def named(self) -> int:
        """How many blocks hold tokens that can be found again."""
        return len(self._named)

    def take(self, n: int) -> list[int] | None:
        """`n` block ids for new content, or None (and nothing taken) where fewer are free."""
        if n > len(self._free):
            return None
        ids = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in ids:
            self._holders[block] = 1
            key = self._keys[block]
            if key is not None:
                self._keys[block] = None
                del self._named[key]
        return ids

    def free(self, ids: Sequence[int]) -> None:
        """One holder gives blocks back; ValueError for a block that is not held.

        Of a sequence's blocks the last ones go first when room is needed: the first ones are what others share.
        """
        for block in reversed(ids):
            if not 0 <= block < len(self._holders) or not self._holders[block]:
                raise ValueError(f"block {block} is not taken")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks that hold what the keys name, up to the first key that none does. Nothing is taken."""
        found: list[int] = []
        for key in keys:
            block = self._named.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, ids: Iterable[int]) -> None:
        """One more holder for blocks that were found."""
        for block in ids:
            self._holders[block] += 1
            self._free.pop(block, None)

    def name(self, block: int, key: bytes) -> None:
        """A held block's content is complete on every stage; it is found by `key` from now on.

        Where another block holds the same, that one stays the one that is found.
        """
        if self._keys[block] is None and key not in self._named:
            self._keys[block] = key
            self._named[key] = block


def block_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Names one full block: its tokens, and by `before` (the key of the block before it, or empty) all in front."""
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()
