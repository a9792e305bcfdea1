"""The demo's table: what is chosen on which text, and what it is said to mean."""

from collections.abc import Sequence

import numpy as np
import pytest
from ralmq.client.results import Token
from ralmq.demo.measure import LAMBDAS, SEEDS, Row, Text, meaning, used
from ralmq.workers.datastore.evaluate import HeldOut, Neighbours
from ralmq.workers.datastore.knn_eval import knn_target_probability
from ralmq.workers.datastore.ngram import Trigram
from ralmq.workers.datastore.score import ModelInfo, Scored
from ralmq.workers.index.stream import TokenStream

N, K, DOCUMENTS = 400, 4, 20


@pytest.fixture
def held() -> HeldOut:
    """A text of which the model thinks that each of 10 tokens is as likely as another; a byte each."""
    tokens = np.random.default_rng(1).integers(0, 10, N + DOCUMENTS).astype(np.int32)
    size = N // DOCUMENTS + 1
    stream = TokenStream(tokens, tuple(f"{n}" for n in range(DOCUMENTS)), np.arange(DOCUMENTS, dtype=np.int64) * size)
    hidden, logp = np.zeros((N, 2), np.float32), np.full(N, np.log(0.1), np.float32)
    return HeldOut(
        Scored(ModelInfo("f", 2, 512, 10), stream, stream.entries(), hidden, logp), N, (size - 1,) * DOCUMENTS
    )


def neighbours(held: HeldOut, right: Sequence[float] | float, seed: int = 0) -> Neighbours:
    """Neighbours whose value is the target for a share `right` of all positions, or of those of each document."""
    rng = np.random.default_rng(seed)
    targets = held.scored.targets[:, None]
    hit = rng.random((N, 1)) < np.broadcast_to(np.repeat(right, N // np.size(right)), N)[:, None]
    values = np.where(hit, targets, (targets + rng.integers(1, 10, (N, 1))) % 10).repeat(K, 1).astype(np.int32)
    ids = np.arange(N * K, dtype=np.int64).reshape(N, K)
    return Neighbours(ids, np.ones((N, K), np.float32), values)


def test_retrieval_that_is_right_helps_and_shuffled_does_not(held: HeldOut) -> None:
    text, found = Text(held), neighbours(held, 0.8)
    model, near = text.alone("model"), text.mixed("near", 100, lambda _: found)
    shuffled = text.mixed("shuffled", 100, found.shuffled)
    assert model.bits == pytest.approx(np.log2(10)) and model.spread == pytest.approx(0) and model.lam is None
    assert near.bits < 0.7 * model.bits and near.spread > 0
    assert shuffled.bits == pytest.approx(model.bits, rel=0.03)
    assert near.lam is not None and shuffled.lam is not None and shuffled.lam < near.lam
    assert near.ngram is None and near.tokens == 100


def test_weights_are_chosen_on_the_drawn_documents_alone(held: HeldOut) -> None:
    """Neighbours that are useless there, and perfect in the others; and the other way round."""
    text = Text(held)
    for perfect in (0.0, 1.0):

        def found(seed: int, perfect: float = perfect) -> Neighbours:
            drawn = text._drawn(seed)
            assert 0.2 < drawn.mean() < 0.5
            return neighbours(held, np.where(drawn, perfect, 1.0 - perfect))

        row = text.mixed("near", 100, found)
        if perfect:
            assert row.lam == max(LAMBDAS) and row.bits > 1.9 * text.alone("model").bits
        else:
            assert (row.lam, row.temperature) == (0.0, None)
            assert row.bits == pytest.approx(text.alone("model").bits)
    assert len({text._drawn(seed).tobytes() for seed in SEEDS}) == 3


def test_the_mix_is_what_the_policy_mixes(held: HeldOut) -> None:
    """p = lambda p_knn + weight p_ngram + rest p_lm, the better of all choices on what was drawn."""
    scored = held.scored
    table = Trigram.fit(scored.stream.tokens, 10, scored.stream.starts)
    found = neighbours(held, 0.3)
    text = Text(held)
    both = text.mixed("both", 100, lambda _: found, table)
    p_knn = knn_target_probability(found.distances, found.values, scored.targets, 1.0)
    p_table = table.probability(scored.contexts, scored.targets)
    documents = scored.stream.documents_of(scored.entries)
    bits = []
    for seed in SEEDS:
        drawn = text._drawn(seed)[documents]
        ways = [
            lam * p_knn + share * p_table + (1 - lam - share) * 0.1
            for lam in LAMBDAS
            for share in (*LAMBDAS, 1.0)
            if lam + share < 1.001
        ]
        best = min(ways, key=lambda p, drawn=drawn: -np.log2(p[drawn]).sum())
        bits.append(-np.log2(best[~drawn]).sum() / (~drawn).sum())
    assert both.bits == pytest.approx(np.mean(bits)) and both.spread == pytest.approx(max(bits) - min(bits))
    alone = text.mixed("counts", 100, table=table)
    assert both.bits <= alone.bits + 0.02 and alone.lam is None and alone.ngram is not None


def test_a_position_without_neighbours_is_the_model_s(held: HeldOut) -> None:
    found = neighbours(held, 0.0)
    none = Neighbours(np.full_like(found.ids, -1), found.distances, np.full_like(found.values, -1))
    text = Text(held)
    assert text.mixed("none", 100, lambda _: none).bits == pytest.approx(text.alone("model").bits)


def rows(*bits: float) -> list[Row]:
    return [Row(str(number), value) for number, value in enumerate(bits)]


@pytest.mark.parametrize(
    ("bits", "said", "unsaid"),
    [
        ((2.0, 1.5, 2.0, 2.01, 1.6, 1.5), "saves 25% of the bits, the controls at most 0.0%", "n-gram"),
        ((2.0, 1.5, 1.99, 2.0, 1.4, 1.4), "n-gram counts of the same text do better", "only the difference"),
        ((2.0, 1.5, 1.99, 2.0, 1.4, 1.2), "Both together save 40%", "only the difference"),
        ((2.0, 1.5, 1.6, 2.0, 1.6, 1.5), "a control saves 20.0%: only the difference", "what helps is"),
        ((2.0, 2.0, 1.9, 2.0, 2.1, 2.0), "does not help", "saves"),
    ],
)
def test_the_sentence_says_what_the_numbers_say(bits: tuple[float, ...], said: str, unsaid: str) -> None:
    assert said in meaning(rows(*bits)) and unsaid not in meaning(rows(*bits))


def test_the_documents_that_were_used_are_those_that_agree() -> None:
    def passage(document: str, distance: float, continuation: str) -> dict[str, object]:
        return {"document": document, "distance": distance, "context": "before", "continuation": continuation}

    tokens = [
        Token(" red", 1, 5, passages=(passage("a", 2.0, " red hat"), passage("b", 1.0, " blue"))),
        Token(" hat", 2, 6, passages=(passage("a", 1.0, " hat"), passage("a", 3.0, " hat"), passage("c", 9.0, " hat"))),
        Token("", 3, 7, passages=(passage("d", 0.0, "anything"),)),
    ]
    assert [(one.document, one.tokens, one.distance) for one in used(tokens)] == [("a", 2, 1.0), ("c", 1, 9.0)]
