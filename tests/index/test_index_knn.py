"""The mixing of kNN-LM against plain loops, bits per byte, and the shuffled control."""

import math

import numpy as np
import pytest
from ralmq.workers.datastore.evaluate import Neighbours
from ralmq.workers.datastore.knn_eval import bits_per_byte, knn_log_probability, knn_target_probability, mix


def by_hand(distances: np.ndarray, values: np.ndarray, target: int, temperature: float) -> float:
    pairs = [(float(d), int(v)) for d, v in zip(distances, values, strict=True) if v >= 0]
    if not pairs:
        return 0.0
    nearest = min(d for d, _ in pairs)
    weights = [math.exp(-(d - nearest) / temperature) for d, _ in pairs]
    return sum(w for w, (_, v) in zip(weights, pairs, strict=True) if v == target) / sum(weights)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_target_probability_is_that_of_plain_loops(temperature: float) -> None:
    rng = np.random.default_rng(2)
    distances = (rng.random((200, 9)) * 40).astype(np.float32)
    values = rng.integers(-1, 5, (200, 9)).astype(np.int32)
    distances[values < 0] = np.inf
    targets = rng.integers(0, 5, 200).astype(np.int32)
    found = knn_target_probability(distances, values, targets, temperature)
    wanted = [by_hand(d, v, int(t), temperature) for d, v, t in zip(distances, values, targets, strict=True)]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=0)


def test_probabilities_of_all_targets_sum_to_one() -> None:
    rng = np.random.default_rng(3)
    distances, values = rng.random((6, 8)).astype(np.float32), rng.integers(0, 4, (6, 8)).astype(np.int32)
    total = sum(knn_target_probability(distances, values, np.full(6, token, np.int32), 1.0) for token in range(4))
    np.testing.assert_allclose(total, np.ones(6), rtol=1e-12)


def test_large_and_small_distances_neither_overflow_nor_vanish() -> None:
    values = np.array([[1, 2]], np.int32)
    for base in (0.0, 1e6, 3e38):
        distances = np.array([[base, base]], np.float32)
        assert knn_target_probability(distances, values, np.array([1], np.int32), 1e-3).tolist() == [0.5]
    apart = np.array([[1e4, 1e6]], np.float32)
    assert knn_target_probability(apart, values, np.array([1], np.int32), 1.0).tolist() == [1.0]


def test_rows_without_neighbours_keep_the_model() -> None:
    logp = np.array([-1.5, -2.5], np.float32)
    distances, values = np.array([[np.inf], [1.0]], np.float32), np.array([[-1], [3]], np.int32)
    found = knn_log_probability(logp, distances, values, np.array([3, 3], np.int32), lam=0.25, temperature=1.0)
    assert found[0] == -1.5
    assert found[1] == pytest.approx(math.log(0.25 + 0.75 * math.exp(-2.5)), abs=1e-15)
    no_columns = np.empty((2, 0), np.float32), np.empty((2, 0), np.int32)
    kept = knn_log_probability(logp, *no_columns, np.array([3, 3], np.int32), lam=0.25, temperature=1.0)
    assert kept.tolist() == [-1.5, -2.5]


@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
def test_lambda_is_a_share(lam: float) -> None:
    with pytest.raises(ValueError, match="knn_lambda"):
        mix(np.ones(1), np.ones(1), lam)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="knn_temperature"):
        knn_target_probability(
            np.ones((1, 1), np.float32), np.ones((1, 1), np.int32), np.ones(1, np.int32), temperature
        )


def test_bits_per_byte() -> None:
    assert bits_per_byte(np.log(np.array([0.5, 0.25, 0.125])), 3) == pytest.approx(2.0, abs=1e-15)
    with pytest.raises(ValueError, match="no bytes"):
        bits_per_byte(np.zeros(1), 0)


def test_shuffling_moves_values_between_entries_and_nothing_else() -> None:
    ids = np.array([[4, 9, 2], [9, 4, -1], [7, 2, 9]])
    distances = np.arange(9, dtype=np.float32).reshape(3, 3)
    value_of = {4: 40, 9: 90, 2: 20, 7: 70, -1: -1}
    values = np.vectorize(value_of.get)(ids).astype(np.int32)
    mixed = Neighbours(ids, distances, values).shuffled(seed=3)
    drawn = {int(i): int(v) for i, v in zip(ids.ravel(), mixed.values.ravel(), strict=True)}
    assert [[drawn[int(i)] for i in row] for row in ids] == mixed.values.tolist()  # one value an entry, in every query
    assert drawn != value_of and drawn[-1] == -1
    assert sorted(drawn.values()) == sorted(value_of.values())
    assert mixed.ids is ids and mixed.distances is distances
    assert values.tolist() == np.vectorize(value_of.get)(ids).tolist()
