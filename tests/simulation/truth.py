"""What a model without weights says: each token follows from a hash of all before it. Knows no message.

Whoever reads a text can tell at once whether it was computed from the right prefix, and from the right neighbours.
"""

from collections.abc import Iterable, Sequence

MASK = (1 << 61) - 1
VOCABULARY = 997
START = 0x1D872B41
SHARDS = 2
K = 3


def grown(prefix: int, token: int) -> int:
    """The hash of a prefix and one token more."""
    return (prefix * 6364136223846793005 + token * 1442695040888963407 + 1) & MASK


def prefix_of(tokens: Iterable[int]) -> int:
    """The hash of tokens from the start."""
    value = START
    for token in tokens:
        value = grown(value, token)
    return value


def sampled(prefix: int, seed: int, position: int, found: int) -> int:
    """The token behind a prefix; `seed` below 0: greedy, `found`: of what was retrieved, or 0."""
    value = prefix ^ found ^ (0 if seed < 0 else (seed + 1) * 2654435761 ^ position * 40503)
    value = value * 0x9E3779B97F4A7C15 & MASK
    return (value ^ value >> 29) % VOCABULARY


def searched(shard: int, query: int, k: int) -> list[tuple[int, int]]:
    """The best k of one shard: (distance, id), the nearest first."""
    return sorted(((query * (2 * i + 3) >> 7) % 1009, shard + SHARDS * i) for i in range(2 * k))[:k]


def digest(hits: Iterable[tuple[float, int]]) -> int:
    """What hits (distance, id) come to, above 0."""
    return prefix_of(int(number) for hit in hits for number in hit) | 1


def found(query: int, k: int) -> int:
    """What a right fan-out over all shards finds."""
    return digest(sorted(hit for shard in range(SHARDS) for hit in searched(shard, query, k))[:k])


def text(
    prompt: Sequence[int], most: int, seed: int, interval: int, stops: Sequence[int]
) -> tuple[list[int], list[int], str]:
    """Tokens, the hashes that they were sampled from, and the finish reason; `interval` 0: no retrieval."""
    tokens: list[int] = []
    hashes: list[int] = []
    value = prefix_of(prompt)
    while len(tokens) < most:
        place = len(tokens)
        extra = found(value, K) if interval and place % interval == 0 else 0
        hashes.append(value)
        tokens.append(sampled(value, seed, len(prompt) + place, extra))
        if tokens[-1] in stops:
            return tokens, hashes, "stop"
        value = grown(value, tokens[-1])
    return tokens, hashes, "length"
