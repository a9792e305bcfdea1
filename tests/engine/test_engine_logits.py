"""Bias, penalties, filters and alternatives against transformers' processors and plain numpy."""

import math

import numpy as np
import pytest
import torch
from ralmq.workers.engine.logits import History
from ralmq.workers.engine.rows import log_probs_of, sample_rows, top_log_probs
from ralmq.workers.engine.sample import SamplingParams, choose, probabilities, uniform
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 400
random = np.random.default_rng(3)


def drawn_logits(scale: float = 3.0) -> np.ndarray:
    return (random.standard_normal(VOCAB) * scale).astype(np.float32)


def draw_all(params: SamplingParams, p: np.ndarray, monkeypatch: pytest.MonkeyPatch, steps: int = 1000) -> np.ndarray:
    """The share of [0, 1) that leads to each token."""
    found = np.zeros(len(p))
    for step in range(steps):
        monkeypatch.setattr("ralmq.workers.engine.sample.uniform", lambda *_, u=(step + 0.5) / steps: u)
        found[choose(p, params, 0)] += 1 / steps
    return found


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 2.5])
@pytest.mark.parametrize("prompt", [1, 5, 60])
def test_repetition_penalty_of_transformers(penalty: float, prompt: int) -> None:
    tokens = random.integers(0, VOCAB, prompt + 30)
    history = History(SamplingParams(repetition_penalty=penalty), tokens[:prompt], prompt)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for known in range(prompt, prompt + 30):
        logits = drawn_logits()
        before = logits.copy()
        wanted = processor(torch.from_numpy(tokens[None, :known]), torch.from_numpy(logits[None].copy()))[0].numpy()
        assert np.array_equal(history.adjusted(logits), wanted)
        assert np.array_equal(logits, before), "log-probabilities are still to be read from them"
        history.add(int(tokens[known]))
    assert history.tokens.tolist() == tokens.tolist()


def test_presence_and_frequency_count_the_output_alone() -> None:
    for prompt, presence, frequency in ((4, 0.5, 0.0), (9, 0.0, 0.7), (30, -1.5, 2.0)):
        tokens = random.integers(0, 12, prompt + 150)
        params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
        history = History(params, tokens[:prompt], prompt)
        for known in range(prompt, prompt + 150):
            logits = drawn_logits()
            counts = np.bincount(tokens[prompt:known], minlength=VOCAB)
            wanted = logits - frequency * counts - presence * (counts > 0)
            assert np.allclose(history.adjusted(logits), wanted, atol=1e-5)
            history.add(int(tokens[known]))


def test_a_replay_knows_what_is_prompt_and_what_output() -> None:
    tokens = random.integers(0, 20, 80)
    params = SamplingParams(
        repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, min_tokens=60, logit_bias=((3, 2.0),)
    )
    whole = History(params, tokens[:10], 10, stops=(5, 7))
    for token in tokens[10:]:
        whole.add(int(token))
    logits = drawn_logits()
    for cut in range(10, 81, 7):
        replayed = History(params, tokens[:cut], 10, stops=(5, 7))
        for token in tokens[cut:]:
            replayed.add(int(token))
        assert np.array_equal(replayed.adjusted(logits), whole.adjusted(logits))
    alien = History(params, tokens, 80, stops=(5, 7))
    assert not np.array_equal(alien.adjusted(logits), whole.adjusted(logits))


def test_bias_is_added_first_as_transformers_does() -> None:
    tokens = random.integers(0, VOCAB, 40)
    bias = {int(tokens[3]): 4.5, int(tokens[8]): -7.0, 399: 100.0}
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(1.5),
        ]
    )
    params = SamplingParams(repetition_penalty=1.5, logit_bias=tuple(bias.items()))
    history = History(params, tokens, 40)
    for _ in range(20):
        logits = drawn_logits()
        wanted = processors(torch.from_numpy(tokens[None]), torch.from_numpy(logits[None].copy()))[0].numpy()
        assert np.allclose(history.adjusted(logits), wanted, rtol=1e-6)


def test_no_end_before_min_tokens() -> None:
    history = History(SamplingParams(min_tokens=3), np.arange(5), 5, stops=(7, 2))
    processor = MinNewTokensLengthLogitsProcessor(5, 3, [2, 7], device="cpu")
    known = list(range(5))
    for token in (9, 9, 9, 9, 9):
        logits = drawn_logits()
        wanted = processor(torch.tensor([known]), torch.from_numpy(logits[None].copy()))[0].numpy()
        assert np.array_equal(history.adjusted(logits), wanted)
        history.add(token)
        known.append(token)
    only = np.full(VOCAB, -np.inf, np.float32)
    only[7] = 0.0
    assert History(SamplingParams(min_tokens=3), np.arange(5), 5, stops=(7, 2)).adjusted(only).argmax() == 7


def test_logits_of_rows_without_any_of_it_are_not_copied() -> None:
    logits = drawn_logits()
    assert History(SamplingParams(temperature=0.7, min_p=0.1, top_p=0.9), np.arange(3), 3).adjusted(logits) is logits


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (30, 0.9)])
def test_the_filters_of_transformers(temperature: float, min_p: float, top_k: int, top_p: float) -> None:
    """The order temperature, min_p, top_k, top_p: every token that is kept, and no other, with its share of draws."""
    logits = drawn_logits(2.0)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    wanted = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits[None].copy()).double())[0]
    wanted_p = torch.softmax(wanted, -1).numpy()
    p = probabilities(logits)
    params = SamplingParams(temperature, top_k, top_p, min_p=min_p)
    with pytest.MonkeyPatch.context() as patch:
        found = draw_all(params, p, patch)
    assert np.abs(found - wanted_p).max() < 2e-3
    assert not found[wanted_p == 0.0].any() and found[wanted_p > 2e-3].all()


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    """All kinds of rows at once give what each gives alone, tokens and log-probabilities; logits stay as they were."""
    kinds = [
        SamplingParams(),
        SamplingParams(repetition_penalty=3.0, logprobs=True),
        SamplingParams(1.0, seed=4, presence_penalty=2.0, frequency_penalty=2.0),
        SamplingParams(0.8, seed=5, min_p=0.05, logprobs=True),
        SamplingParams(logit_bias=((17, 100.0),)),
        SamplingParams(1.2, 20, 0.9, seed=6, logit_bias=((17, -100.0),), repetition_penalty=1.2),
        SamplingParams(min_tokens=9),
    ]
    params = [kinds[place % len(kinds)] for place in range(150)]
    logits = np.stack([drawn_logits() for _ in params])
    before = logits.copy()
    histories = [
        History(each, random.integers(0, VOCAB, 50), 20, stops=(int(row.argmax()),))
        for each, row in zip(params, logits, strict=True)
    ]
    positions = list(range(50, 200))
    tokens, log_p = sample_rows(logits, params, positions, histories)
    for place, each in enumerate(params):
        one = sample_rows(logits[place : place + 1], [each], positions[place : place + 1], [histories[place]])
        assert ([tokens[place]], [log_p[place]]) == one
    assert np.array_equal(logits, before)
    greedy = logits.argmax(1)
    assert [tokens[place] == 17 for place in range(len(params)) if kinds[place % 7].logit_bias == ((17, 100.0),)]
    assert all(tokens[place] == greedy[place] for place in range(0, 150, 7))
    assert any(tokens[place] != greedy[place] for place in range(1, 150, 7)), "the penalty changes something"


def test_a_seeded_row_follows_its_definition() -> None:
    """The inverse CDF of u over what transformers' processors keep, sorted by (p, id)."""
    tokens = random.integers(0, VOCAB, 30)
    for seed in range(60):
        logits = drawn_logits(2.0)
        params = SamplingParams(0.9, 40, 0.95, seed=seed, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.5)
        given = History(params, tokens, 20)
        counts = np.bincount(tokens[20:], minlength=VOCAB)
        ids = torch.from_numpy(tokens[None])
        scores = RepetitionPenaltyLogitsProcessor(1.3)(ids, torch.from_numpy(logits[None].copy())).double()
        scores -= torch.from_numpy(0.5 * (counts > 0))
        for warper in (
            TemperatureLogitsWarper(0.9),
            MinPLogitsWarper(0.01),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.95),
        ):
            scores = warper(ids, scores)
        p = torch.softmax(scores[0], -1).numpy()
        order = np.argsort(-p, kind="stable")
        borders = p[order].cumsum()
        u = uniform(seed, 30)
        assert np.abs(borders - u).min() > 1e-6, "no draw of these seeds is near a border"
        wanted = int(order[borders.searchsorted(u)])
        assert sample_rows(logits[None], [params], [30], [given])[0] == [wanted]


def test_alternatives_are_the_most_probable_best_first() -> None:
    logits = np.stack([drawn_logits() for _ in range(70)])
    logits[3, [5, 9, 2]] = 50.0  # equals: the lower id first
    logits[4, :] = 0.0
    for count in (1, 5, 20, VOCAB + 5):
        ids, values = top_log_probs(logits, count)
        assert ids.shape == values.shape == (70, min(count, VOCAB))
        wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
        for row in range(70):
            order = np.lexsort((np.arange(VOCAB), -logits[row]))[:count]
            assert ids[row].tolist() == order.tolist()
            assert np.abs(values[row] - wanted[row][order]).max() < 1e-5
    for column in range(3):
        assert np.array_equal(log_probs_of(logits, ids[:, column]), values[:, column])


def test_values_outside_their_range_are_refused() -> None:
    for changes, message in (
        ({"min_p": -0.1}, "min_p is -0.1; give 0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; give more than 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**changes)
