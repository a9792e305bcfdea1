"""Medians, ratios and bounds of the broker bench from given samples."""

import io

import pytest
from ralmq.bench.broker import SIZES, Report, Sample, checks_of, row_of
from ralmq.bench.load import Tally
from ralmq.bench.report import show
from ralmq.bench.systems import ASYNCIO, PROXY, RALMQ, Cpu
from rich.console import Console


def sample(rate: int, main: float, *, lost: int = 0) -> Sample:
    return Sample(Tally(rate + lost, rate, rate, 0, 0, 0, lost, 1.0, ""), Cpu(main, main / 2))


def samples() -> dict[str, list[Sample]]:
    return {
        RALMQ: [sample(6000, 0.06), sample(600, 0.006), sample(5400, 0.054)],
        PROXY: [sample(8000, 0.02), sample(1000, 0.002), sample(6000, 0.02)],
        ASYNCIO: [sample(1000, 0.05), sample(100, 0.005), sample(1200, 0.06)],
    }


def report() -> Report:
    rows = [row_of(place, samples()) for place in range(len(SIZES))]
    checks = checks_of(rows, {RALMQ: 1.0}, 0)
    return Report("c", "", 2, 3, 1.0, rows, {RALMQ: 1.0}, 0.1, {RALMQ: 0}, [], checks)


def test_a_ratio_is_the_median_of_ratios_within_a_round() -> None:
    row = row_of(1, samples())
    assert row.ratios[PROXY] == [0.75, 0.6, 0.9]
    assert row.ratio[PROXY] == 0.75
    assert row.ratio[ASYNCIO] == 6.0
    assert row.rate == {RALMQ: 5400.0, PROXY: 6000.0, ASYNCIO: 1000.0}


def test_cpu_is_that_of_all_rounds_over_all_round_trips() -> None:
    row = row_of(0, samples())
    assert row.main_cpu_us[RALMQ] == pytest.approx(10.0)
    assert row.other_cpu_us[RALMQ] == pytest.approx(5.0)


def test_bounds() -> None:
    found = report()
    by_name = {check.name: check for check in found.checks}
    assert [name for name, check in by_name.items() if not check.ok] == ["64 KiB: rate, of the C proxy's"]
    assert not found.ok
    assert found.document()["ok"] is False
    assert by_name["4 KiB: rate, of the zmq.asyncio broker's"].measured == 6.0
    assert by_name["4 KiB: main-thread CPU, of zmq.asyncio's"].measured == pytest.approx(0.2)


def test_a_missed_target_does_not_decide() -> None:
    found = report()
    found.checks = [check for check in found.checks if not check.required or check.ok]
    for check in found.checks:
        check.ok = check.required
    assert found.ok


def test_lost_requests_break_a_bound() -> None:
    rows = [row_of(place, samples()) for place in range(len(SIZES))]
    checks = checks_of(rows, {RALMQ: 1.0}, sample(10, 0.1, lost=1).tally.faults)
    assert [check.ok for check in checks if "lost" in check.name] == [False]


def test_without_baselines_there_are_no_ratios() -> None:
    rows = [row_of(place, {RALMQ: samples()[RALMQ]}) for place in range(len(SIZES))]
    checks = checks_of(rows, {RALMQ: 3.0}, 0)
    assert not any("rate" in check.name for check in checks)
    assert [check.ok for check in checks if "idle" in check.name] == [False]


def test_the_tables_hold_what_was_measured() -> None:
    console = Console(file=io.StringIO(), width=120)
    show(report(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("5,400", "0.75", "10.0", "64 KiB: rate, of the C proxy's", "idle CPU"):
        assert part in text
    assert "rough" not in text
