"""A hundred and twenty seeded runs of the real core among model peers and faults: each is right, or says how."""

import os
from collections import Counter

import pytest
from simulation.scenario import Result, simulate

ALL = 120
SEEDS = range(int(os.environ.get("RALMQ_SEEDS", ALL)))
_results: dict[int, Result] = {}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_request_is_lost_doubled_crossed_or_endless(seed: int) -> None:
    _results[seed] = simulate(seed)
    assert _results[seed].steps > 100


def test_a_seed_gives_the_same_run_again() -> None:
    first, second = simulate(6), simulate(6)
    assert (first.steps, first.ended, first.counts) == (second.steps, second.ended, second.counts)


def test_the_runs_meet_what_can_go_wrong() -> None:
    """Counts over all seeds: a fault or an ending that never happens would make the runs above say nothing of it."""
    if len(_results) < ALL:
        pytest.skip("needs the results of all seeds")
    ended: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for result in _results.values():
        ended.update(result.ended)
        counts.update(result.counts)
    for how in ("busy", "cancelled", "deadline", "final", "no_service", "worker_failed", "worker_lost"):
        assert ended[how] > 100, (how, ended)
    for what in ("abandoned", "duplicates", "fenced", "lost_peers", "requeued", "Bye", "Cancel", "Credit", "Step"):
        assert counts[what] > 50, (what, counts)
    for what in ("expired", "poisoned", "unlisted"):
        assert counts[what] > 5, (what, counts)
    assert ended["final"] > sum(ended.values()) / 4
