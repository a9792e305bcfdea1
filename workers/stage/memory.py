"""The KV blocks of all sequences: who gets some, what can be found again, who must give way. Knows no schedule."""

from ..engine.pool import BLOCK, BlockPool
from .batch import Phase, Sequence, blocks_for

HOLD = 8  # blocks of a common prefix for which it pays to wait until another sequence has computed them


class Memory:
    """The block table of a pipeline, which holds for all its stages.

    Full blocks are named by their tokens once every stage has computed them, and found again by whoever has the same
    tokens from the start (automatic prefix caching, as in vLLM; Kwon et al. 2023).

    Attributes:
        reused: tokens that were found instead of computed.
        peak: most blocks that were held at a time.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.reused = 0
        self.peak = 0
        self._pool = BlockPool(blocks)
        self._computing: dict[bytes, Sequence] = {}

    @property
    def available(self) -> int:
        """Blocks that no sequence holds; those of the prefix cache count as free."""
        return self._pool.available

    @property
    def cached(self) -> int:
        """Blocks whose tokens can be found again."""
        return self._pool.named

    def worth_waiting(self, sequence: Sequence) -> bool:
        """One before it in turn is computing more of a long prefix that this one will find."""
        if not self._computing:
            return False
        keys = self._usable(sequence)
        found = shared = len(self._pool.find(keys))
        while shared < len(keys) and (other := self._computing.get(keys[shared])) is not None:
            if other.phase is Phase.PAUSED or other.turn > sequence.turn:
                break
            shared += 1
        return shared > found and shared >= HOLD

    def admit(self, sequence: Sequence, reserve: int) -> bool:
        """Blocks for all tokens that it has, cached ones first; False (and nothing changed) if it would leave fewer
        than `reserve` free."""
        found = self._pool.find(self._usable(sequence))
        self._pool.share(found)
        missing = blocks_for(sequence.known) - len(found)
        fresh = self._pool.take(missing) if self._pool.available - missing >= reserve else None
        if fresh is None:
            self._pool.free(found)
            return False
        sequence.blocks = [*found, *fresh]
        self.peak = max(self.peak, self.blocks - self.available)
        sequence.named = len(found)
        sequence.computed = len(found) * BLOCK
        self.reused += sequence.computed
        for key in sequence.keys_of(sequence.known // BLOCK)[len(found) :]:
            self._computing.setdefault(key, sequence)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Room for the one token that is not computed yet; False where no block is free."""
        if sequence.computed < len(sequence.blocks) * BLOCK:
            return True
        fresh = self._pool.take(1)
        if fresh is None:
            return False
        sequence.blocks += fresh
        self.peak = max(self.peak, self.blocks - self.available)
        return True

    def complete(self, sequence: Sequence, end: int) -> None:
        """Every stage has computed its tokens up to `end`: full blocks can be found from now on."""
        full = end // BLOCK
        if not sequence.blocks or full <= sequence.named:
            return
        keys = sequence.keys_of(full)
        for place in range(sequence.named, full):
            self._pool.name(sequence.blocks[place], keys[place])
        self._computed(keys[sequence.named :], sequence)
        sequence.named = full

    def drop(self, sequence: Sequence) -> None:
        """It gives its blocks back. No stage writes to them any more."""
        self._computed(sequence.keys[sequence.named :], sequence)
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.named = 0

    def _usable(self, sequence: Sequence) -> list[bytes]:
        """Keys of the blocks that it may find: at least one token is computed, or nothing would come out."""
        return sequence.keys_of(max(0, sequence.known - sequence.own) // BLOCK)

    def _computed(self, keys: list[bytes], sequence: Sequence) -> None:
        for key in keys:
            if self._computing.get(key) is sequence:
                del self._computing[key]
