"""A request as the leader sees it, and a micro-batch. Knows tokens and block ids: no schedule, tensor or time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ...schema.message import Active, Row, Start
from ..engine.pool import BLOCK, block_key

Key = tuple[bytes, int]  # id and attempt of a request
SCORED = 256  # tokens of a score in one row at most, whose results are one part


class Phase(Enum):
    """Where a sequence is."""

    WAITING = "waiting for KV blocks"
    PREFILL = "some of its tokens are not computed"
    READY = "ready for its next token"
    AWAITED = "its next token is on the way"
    PAUSED = "its reader is slow"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request of the pipeline.

    Attributes:
        tokens: the prompt, then what was sampled.
        need: KV slots that it may use at most.
        until: new tokens (parts, of a score) that its reader takes (0 = no bound), asked anew each time.
        ended: called once, when no stage will write to its blocks any more.
        size: bytes of its parameters.
        priority: 0 to 9, the highest first.
        own: tokens at its end that it computes itself, though their blocks may be there: their hidden states are used.
        length: tokens of the prompt.
        order: of arrival; `stamp` is that of becoming ready.
        computed: tokens in micro-batches so far, those under way included; `blocks` hold at least them.
        flown: tokens that were ever in a micro-batch.
        parts: rows of a score that gave something new.
        keys: of its full blocks, as far as they were asked for; the first `named` of them are in the cache.
        flying: micro-batches under way that write to its blocks.
        over: it ends once none of them does.
        cross: so many of its first tokens stand for an encoder's `states` [cross, d], of which `salt` is a digest.
    """

    id: bytes
    attempt: int
    tokens: list[int]
    params: dict[str, Any]
    need: int
    until: Callable[[], int]
    ended: Callable[[], None]
    priority: int = 4
    own: int = 1
    size: int = 0
    length: int = 0
    order: int = 0
    stamp: int = 0
    computed: int = 0
    flown: int = 0
    parts: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    named: int = 0
    phase: Phase = Phase.WAITING
    flying: int = 0
    over: bool = False
    started: bool = False
    cross: int = 0
    states: Any = None
    salt: bytes = b""

    @property
    def key(self) -> Key:
        return self.id, self.attempt

    @property
    def turn(self) -> tuple[int, int]:
        """Who comes first among those that want the same; the smallest."""
        return -self.priority, self.order

    @property
    def scored(self) -> bool:
        """It asks for what the model makes of its prompt, not for new tokens."""
        return "feed" in self.params

    @property
    def known(self) -> int:
        """Tokens that can be computed now."""
        return int(self.params["feed"]) if self.scored else len(self.tokens)

    def keys_of(self, blocks: int) -> list[bytes]:
        """Keys of its first full blocks."""
        while len(self.keys) < blocks:
            start = len(self.keys) * BLOCK
            before = self.keys[-1] if self.keys else self.salt
            self.keys.append(block_key(before, self.tokens[start : start + BLOCK]))
        return self.keys[:blocks]


@dataclass(slots=True)
class Batch:
    """One micro-batch: number (0: no rows), rows, parameters of new ones, ended sequences, ids of all rows.

    Of an encoder-decoder also how many encoder states each row's sequence has, and those that rows hold.
    """

    number: int
    rows: list[Row]
    starts: list[Start]
    ended: list[Active]
    ids: list[int]
    prompts: list[int]
    cross: list[int] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)


def blocks_for(tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    return -(-tokens // BLOCK)
