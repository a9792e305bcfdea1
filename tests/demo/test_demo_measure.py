"""The demo's table: what is chosen on which text, and what it is said to mean."""

import numpy as np
import pytest
from ralmq.client.results import Token
from ralmq.demo.measure import Pair, Row, Slices, alone, knn, meaning, used
from ralmq.workers.datastore.evaluate import HeldOut, Neighbours
from ralmq.workers.datastore.score import ModelInfo, Scored
from ralmq.workers.index.stream import TokenStream

N, K = 400, 4


def scored(seed: int) -> HeldOut:
    """A text of which the model thinks that each of 10 tokens is as likely as another."""
    tokens = np.random.default_rng(seed).integers(0, 10, N + 1).astype(np.int32)
    stream = TokenStream(tokens, ("text",), np.zeros(1, np.int64))
    hidden, logp = np.zeros((N, 2), np.float32), np.full(N, np.log(0.1), np.float32)
    return HeldOut(Scored(ModelInfo("f", 2, 512, 10), stream, stream.entries(), hidden, logp), N)


def neighbours(held: HeldOut, right: float, seed: int = 0) -> Neighbours:
    """Neighbours whose value is the target for a share `right` of all positions."""
    rng = np.random.default_rng(seed)
    targets = held.scored.targets[:, None]
    hit = rng.random((N, 1)) < right
    values = np.where(hit, targets, (targets + rng.integers(1, 10, (N, 1))) % 10).repeat(K, 1).astype(np.int32)
    ids = np.arange(N * K, dtype=np.int64).reshape(N, K)
    return Neighbours(ids, np.ones((N, K), np.float32), values)


@pytest.fixture
def slices() -> Slices:
    return Slices(scored(1), scored(2))


def test_retrieval_that_is_right_helps_and_shuffled_does_not(slices: Slices) -> None:
    pair = Pair(neighbours(slices.development, 0.8), neighbours(slices.held_out, 0.8, 1))
    model, near = alone(slices), knn("near", slices, pair, 100)
    shuffled = knn("shuffled", slices, pair.shuffled(), 100)
    assert near.bits < 0.7 * model.bits
    assert shuffled.bits == pytest.approx(model.bits, rel=0.02)
    assert near.lam is not None and shuffled.lam is not None and shuffled.lam < near.lam


def test_lambda_is_chosen_on_the_development_text_alone(slices: Slices) -> None:
    useless, perfect = neighbours(slices.development, 0.0), neighbours(slices.held_out, 1.0)
    row = knn("near", slices, Pair(useless, perfect), 100)
    assert (row.lam, row.temperature, row.bits) == (0.0, None, pytest.approx(alone(slices).bits))


def rows(*bits: float) -> list[Row]:
    return [Row(str(number), value) for number, value in enumerate(bits)]


@pytest.mark.parametrize(
    ("bits", "said", "unsaid"),
    [
        ((2.0, 1.5, 2.0, 2.01, 1.6), "saves 25% of the bits, the controls at most 0.0%", "trigram"),
        ((2.0, 1.5, 1.99, 2.0, 1.4), "trigram table of the same text does better", "only the difference"),
        ((2.0, 1.5, 1.6, 2.0, 1.6), "a control saves 20.0%: only the difference", "what helps is"),
        ((2.0, 2.0, 1.9, 2.0, 2.1), "does not help", "saves"),
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
