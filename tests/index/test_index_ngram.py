"""The trigram table is a distribution, and the one Witten and Bell describe."""

import numpy as np
import pytest
from ralmq.workers.datastore.ngram import Trigram

VOCAB = 11


def every(table: Trigram, contexts: list[list[int]]) -> np.ndarray:
    """p of all tokens behind each context, [contexts, vocab]."""
    pairs = np.repeat(np.array(contexts, np.int32), VOCAB, axis=0)
    targets = np.tile(np.arange(VOCAB, dtype=np.int32), len(contexts))
    return table.probability(pairs, targets).reshape(len(contexts), VOCAB)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40, 2000])
def test_it_sums_to_one_for_seen_and_unseen_contexts(count: int) -> None:
    rng = np.random.default_rng(count)
    tokens = (rng.zipf(1.5, count) % (VOCAB - 2)).astype(np.int32)
    table = Trigram.fit(tokens, VOCAB)
    found = every(table, [[a, b] for a in range(-1, VOCAB) for b in range(-1, VOCAB)])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert (found > 0).all()


def witten_bell(tokens: list[int], starts: list[int], history: tuple[int, ...], target: int) -> float:
    """The definition, counted by hand."""
    lower = witten_bell(tokens, starts, history[1:], target) if history else 1 / VOCAB
    size = len(history)
    followers = [
        tokens[place]
        for place in range(size, len(tokens))
        if tuple(tokens[place - size : place]) == history and not any(place - size < s <= place for s in starts)
    ]
    kinds = len(set(followers))
    return (followers.count(target) + kinds * lower) / (len(followers) + kinds) if followers else lower


@pytest.mark.parametrize("starts", [[0], [0, 30, 31, 80]])
def test_it_is_the_definition(starts: list[int]) -> None:
    tokens = np.random.default_rng(4).integers(0, 5, 120).astype(np.int32)
    found = every(Trigram.fit(tokens, VOCAB, np.array(starts)), [[a, b] for a in range(6) for b in range(6)])
    inner = [start for start in starts if start]
    for place, (a, b) in enumerate((a, b) for a in range(6) for b in range(6)):
        wanted = [witten_bell(tokens.tolist(), inner, (a, b), c) for c in range(VOCAB)]
        np.testing.assert_allclose(found[place], wanted, rtol=1e-12)


def test_a_missing_token_backs_off() -> None:
    tokens = np.random.default_rng(4).integers(0, 5, 120).astype(np.int32)
    tokens[50:53] = 2, VOCAB - 1, 4  # next to (3, -1) in any table that numbers pairs
    found = every(Trigram.fit(tokens, VOCAB), [[-1, 3], [3, -1], [-1, -1], [9, 9]])
    assert found[0].tolist() == pytest.approx([witten_bell(tokens.tolist(), [], (3,), c) for c in range(VOCAB)])
    for row in found[1:]:
        assert row.tolist() == pytest.approx([witten_bell(tokens.tolist(), [], (), c) for c in range(VOCAB)])


def test_no_ngram_reaches_into_the_next_document() -> None:
    table = Trigram.fit(np.array([1, 2, 3, 4], np.int32), VOCAB, np.array([0, 2]))
    crossing, inside = every(table, [[1, 2], [-1, 1]])
    assert crossing[3] == crossing[4] and inside[2] > inside[3]


@pytest.mark.parametrize(("tokens", "vocab"), [([0, 11], 11), ([-1], 11), ([0], 0), ([0], 1 << 21)])
def test_what_cannot_be_counted(tokens: list[int], vocab: int) -> None:
    with pytest.raises(ValueError, match="vocab"):
        Trigram.fit(np.array(tokens, np.int32), vocab)
