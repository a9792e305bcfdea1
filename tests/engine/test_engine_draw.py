"""Sampling where the logits are, against its definition row by row."""

import numpy as np
import pytest
import torch
from ralmq.workers.engine.draw import draw
from ralmq.workers.engine.logits import History
from ralmq.workers.engine.rows import log_probs_of
from ralmq.workers.engine.sample import SamplingParams, choose, probabilities

VOCAB = 500


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_rows_of_all_kinds_together() -> None:
    """Each row has parameters of its own; tokens are those of `choose`, log p those of the logits."""
    random = np.random.default_rng(0)
    rows = 600
    params = [
        SamplingParams(
            temperature=float(random.choice([0.0, 0.3, 1.0, 1.7])),
            top_k=int(random.choice([0, 1, 2, 40, VOCAB, 3 * VOCAB])),
            top_p=float(random.choice([1.0, 0.9, 0.5, 1e-6])),
            min_p=float(random.choice([0.0, 0.05, 0.9, 1.0])),
            seed=int(random.integers(1 << 62)),
        )
        for _ in range(rows)
    ]
    positions = random.integers(0, 5000, rows).tolist()
    x = logits(rows)
    made = draw(x, params, positions)
    assert made.shape == (rows, 2) and made.dtype == torch.float64
    wanted = [
        choose(p, some, position) for p, some, position in zip(probabilities(x.numpy()), params, positions, strict=True)
    ]
    assert made[:, 0].tolist() == wanted
    log_p = log_probs_of(x.numpy(), np.asarray(wanted))
    assert np.abs(made[:, 1].numpy() - log_p).max() < 1e-5


def test_a_draw_follows_the_distribution() -> None:
    """Positions are what numbers are drawn by: over many of them the shares come out."""
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    count = 20_000
    params = [SamplingParams(temperature=1.0, seed=5)] * count
    made = draw(row.expand(count, -1), params, list(range(count)))[:, 0]
    shares = torch.bincount(made.long(), minlength=4) / count
    assert (shares - row[0].softmax(0)).abs().max() < 0.015


def test_the_lowest_id_among_equals() -> None:
    x = torch.zeros(3, VOCAB)
    x[:, [7, 400]] = 2.0
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=1.0, top_k=2)]
    tokens = draw(x, params, [0, 1, 2])[:, 0].tolist()
    assert tokens[:2] == [7, 7] and tokens[2] in (7, 400)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_give_some_token(bad: float) -> None:
    """Their rows fail elsewhere; the rows beside them are drawn as ever."""
    x = logits(3, 2)
    alone = draw(x[2:], [SamplingParams(temperature=1.0, seed=3)], [9])
    x[0, 5] = x[1] = bad
    made = draw(x, [SamplingParams(temperature=float(row > 0), seed=3) for row in range(3)], [9] * 3)
    assert torch.equal(made[2], alone[0])
    assert ((made[:, 0] >= 0) & (made[:, 0] < VOCAB)).all()


def test_what_adjusts_logits_is_known_before() -> None:
    """A row may be drawn where its logits are only if nothing changes them."""
    tokens = np.asarray([3, 4])

    def adjusts(stops: tuple[int, ...] = (), **given: object) -> bool:
        return History(SamplingParams(**given), tokens, 2, stops).adjusts  # type: ignore[arg-type]

    assert not adjusts() and not adjusts(temperature=1.0, top_p=0.5, min_p=0.1) and not adjusts((2,))
    assert adjusts(logit_bias=((1, 2.0),)) and adjusts(repetition_penalty=1.1) and adjusts(presence_penalty=0.5)
    assert adjusts(frequency_penalty=0.1) and adjusts((2,), min_tokens=1)
    history = History(SamplingParams(min_tokens=1), tokens, 2, (2,))
    history.add(9)
    assert not history.adjusts
