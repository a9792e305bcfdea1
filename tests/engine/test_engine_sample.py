"""Sampling and mixing against plain reference code, and random numbers against published ones."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from ralmq.workers.engine.mixing import knn_distribution, mix
from ralmq.workers.engine.rows import log_probs_of, sample_rows
from ralmq.workers.engine.sample import SamplingParams, choose, philox, probabilities, uniform


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    key: tuple[int, int], counter: tuple[int, int, int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox(key, counter) == expected


def test_uniform_depends_on_seed_and_position_alone() -> None:
    assert uniform(7, 11) == uniform(7, 11)
    draws = [uniform(seed, position) for seed in (0, 1, 1 << 40, -1) for position in range(500)]
    assert len(set(draws)) == 2000
    assert all(0.0 <= u < 1.0 for u in draws)
    assert abs(sum(draws) / 2000 - 0.5) < 0.02
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square of 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.07
    assert any(not float(u * 2**32).is_integer() for u in draws)  # more than one 32-bit word


def brute(p: list[float], params: SamplingParams, position: int) -> int:
    """The rule of `choose`, in plain Python."""
    if params.temperature == 0.0:
        return max(range(len(p)), key=lambda i: (p[i], -i))
    top = math.log(max(p))
    weights = [math.exp((math.log(x) - top) / params.temperature) if x > 0 else 0.0 for x in p]
    order = sorted(range(len(p)), key=lambda i: (-weights[i], i))
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i]
        if params.top_p < 1.0 and mass >= params.top_p * total:
            break
    draw, mass = uniform(params.seed, position) * mass, 0.0
    for i in kept:
        mass += weights[i]
        if mass > draw:
            return i
    return kept[-1]


@pytest.mark.parametrize("vocab", [1, 7, 300, 6000])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
def test_choose_against_plain_python(vocab: int, spread: float) -> None:
    rng = np.random.default_rng(vocab)
    tried: set[int] = set()
    for case in range(12 if vocab > 1000 else 60):
        logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
        logits[rng.random(vocab) < 0.2] = logits[0]  # ties
        logits[rng.random(vocab) < 0.1] = -np.inf
        logits[vocab // 2] = 0.0
        p = probabilities(logits)
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
            top_k=int(rng.choice([0, 1, 5, 400])),
            top_p=float(rng.choice([0.05, 0.5, 0.9, 0.999, 1.0])),
            seed=case,
        )
        token = choose(p, params, case)
        assert token == brute(p.tolist(), params, case)
        assert p[token] > 0.0
        tried.add(token)
    assert vocab < 7 or len(tried) > 5


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    p = np.array([0.1, 0.3, 0.3, 0.3])
    assert choose(p, SamplingParams(), 0) == 1
    assert choose(p, SamplingParams(temperature=1.0, top_k=1, seed=5), 9) == 1


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    p = np.array([0.02, 0.4, 0.08, 0.2, 0.05, 0.1, 0.1, 0.05])
    n = 8000
    plain = np.bincount([choose(p, SamplingParams(1.0, seed=3), i) for i in range(n)], minlength=8)
    assert ((plain - n * p) ** 2 / (n * p)).sum() < 24.3  # 7 degrees of freedom, p = 0.001
    cold = p**2 / (p**2).sum()
    drawn = np.bincount([choose(p, SamplingParams(0.5, seed=4), i) for i in range(n)], minlength=8)
    assert ((drawn - n * cold) ** 2 / (n * cold)).sum() < 24.3
    kept = np.bincount([choose(p, SamplingParams(1.0, top_k=4, top_p=0.7, seed=5), i) for i in range(n)], minlength=8)
    assert set(np.flatnonzero(kept)) == {1, 3}  # 0.4 + 0.2 of 0.8 is more than 0.7 of it
    assert abs(kept[1] / n - 2 / 3) < 0.02


def test_the_highest_draw_never_takes_an_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ralmq.workers.engine.sample.uniform", lambda seed, position: 1.0 - 2**-53)
    for p in (np.array([0.1] * 10 + [0.0] * 5), np.array([0.0, 0.3, 0.7, 0.0])):
        for params in (SamplingParams(1.0), SamplingParams(1.0, top_k=len(p) - 1), SamplingParams(1.0, top_p=0.99999)):
            assert p[choose(p, params, 0)] > 0.0


def test_a_draw_on_a_boundary_takes_the_later_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ralmq.workers.engine.sample.uniform", lambda seed, position: 0.5)
    assert choose(np.array([0.25, 0.5, 0.25]), SamplingParams(1.0), 0) == 0


def test_probabilities_are_a_float64_softmax() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4], [0.0, 1.0, 2.0]], dtype=np.float32)
    p = probabilities(logits)
    expected = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    assert p.dtype == np.float64 and np.allclose(p, expected, rtol=1e-14)
    assert logits[0, 0] == 1e4


def test_sample_rows_gives_what_choose_gives_row_by_row() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((6, 500)) * 3).astype(np.float32)
    params = [
        SamplingParams(),
        SamplingParams(1.0, seed=1, logprobs=True),
        SamplingParams(logprobs=True),
        SamplingParams(0.7, top_k=20, seed=2),
        SamplingParams(1.3, top_p=0.8, seed=1 << 63),
        SamplingParams(1.0, seed=1),
    ]
    positions = [5, 6, 7, 8, 9, 6]
    tokens, logprobs = sample_rows(logits, params, positions)
    p = probabilities(logits)
    assert tokens == [choose(row, param, at) for row, param, at in zip(p, params, positions, strict=True)]
    assert all(type(token) is int for token in tokens)
    assert [value is not None for value in logprobs] == [param.logprobs for param in params]
    for i in (1, 2):
        assert logprobs[i] == pytest.approx(math.log(p[i][tokens[i]]), abs=1e-5)


def test_log_probs_of_many_rows() -> None:
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((150, 40)) * 5).astype(np.float32)
    targets = rng.integers(0, 40, 150)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)[torch.arange(150), torch.from_numpy(targets)]
    got = log_probs_of(logits, targets)
    assert got.dtype == np.float32 and got.shape == (150,)
    assert np.abs(got - expected.numpy()).max() < 1e-5
    assert log_probs_of(logits[:0], targets[:0]).shape == (0,)


def test_mixing_equals_plain_numpy() -> None:
    rng = np.random.default_rng(2)
    for lam in (0.1, 0.25, 1.0):
        p_lm = probabilities(rng.standard_normal(50).astype(np.float32))
        distances = rng.random(16).astype(np.float32) * 40
        values = rng.integers(0, 50, 16).astype(np.int32)
        weights = np.exp(-distances.astype(np.float64) / 3.0)
        dense = np.zeros(50)
        for value, weight in zip(values, weights / weights.sum(), strict=True):
            dense[value] += weight
        before = p_lm.copy()
        ids, probs = knn_distribution(distances, values, 50, 3.0)
        mixed = mix(p_lm, ids, probs, lam)
        assert np.abs(mixed - (lam * dense + (1 - lam) * p_lm)).max() < 1e-12
        assert abs(mixed.sum() - 1) < 1e-12
        assert np.array_equal(p_lm, before)
        assert all(a < b for a, b in pairwise(ids))


def test_lambda_zero_and_no_neighbours_leave_the_model_alone() -> None:
    p_lm = np.array([0.5, 0.5])
    ids, probs = knn_distribution(np.array([1.0]), np.array([1]), 2)
    assert mix(p_lm, ids, probs, 0.0) is p_lm
    nobody = knn_distribution(np.array([np.inf, 3.0], dtype=np.float32), np.array([1, -1]), 2)
    assert mix(p_lm, *nobody, 0.25) is p_lm


def test_far_neighbours_do_not_vanish() -> None:
    ids, probs = knn_distribution(np.array([1e6, 1e6 + 1], dtype=np.float64), np.array([4, 2]), 5)
    assert ids.tolist() == [2, 4]
    assert probs.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_bad_input_is_refused_in_one_line() -> None:
    for changes, message in (
        ({"temperature": -0.1}, "temperature is -0.1; give 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; give more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**changes)
    with pytest.raises(ValueError, match="token 9 is outside the vocabulary of 9; rebuild the index"):
        knn_distribution(np.array([1.0]), np.array([9]), 9)
    with pytest.raises(ValueError, match="knn temperature is 0"):
        knn_distribution(np.array([1.0]), np.array([1]), 9, 0.0)
