"""What the engine bench compares does the same work, and its report says what was measured."""

import asyncio
from pathlib import Path

import pytest
import torch
from ralmq.bench import engine, engines
from ralmq.bench.report import Check
from rich.console import Console


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name, value in {"LAYERS": 6, "HIDDEN": 64, "VOCAB": 300}.items():
        monkeypatch.setattr(engines, name, value)
    monkeypatch.setattr(engine, "VOCAB", 300)
    monkeypatch.setattr(engine, "READ", 1 << 20)
    monkeypatch.setattr(engine, "MIDDLE", (2, 4))


def test_every_engine_generates_the_same_ids(tmp_path: Path) -> None:
    engines.write_model(tmp_path / "model")
    loaded = engine.load(tmp_path / "model", tmp_path / "work")
    prompts = torch.randint(299, (3, 9), generator=torch.Generator().manual_seed(1))
    made = {name: generate(prompts, 12) for name, generate in loaded.generate.items()}
    assert {engine.FP32, engine.PLAIN, engine.INT8, engine.HF} <= set(made)
    assert [len(ids) for ids in made[engine.INT8]] == [12] * 3
    for name in (engine.PLAIN, engine.HF, *({engine.CT2} & set(made))):
        assert made[name] == made[engine.FP32]
    matrices = 12 * 64 * 64 * 6 + 300 * 64
    assert loaded.weights == 4 * (matrices + 6 * 13 * 64 + 2 * 64)  # biases and norms: 9 + 4 a layer, 2 at the end


def test_a_step_after_a_long_context_is_the_same_work(tmp_path: Path) -> None:
    """Keys and values are zero in both at first; the second step of transformers begins where the first one did."""
    engines.write_model(tmp_path / "model")
    following = engine.load(tmp_path / "model", tmp_path / "work").following
    for batch in (1, 8, 1):
        expected = following[engine.HF](batch)
        assert expected.shape == (batch, 300)
        assert (following[engine.FP32](batch) - expected).abs().max() < 1e-5


def test_a_report_holds_rates_checks_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "loading_ratios", lambda path, rounds: [5.0] * rounds)
    rows = asyncio.run(engine.bench(quick=True))
    rates = [row for row in rows if isinstance(row, engine.Rate)]
    checks = {row.name: row for row in rows if isinstance(row, Check)}
    assert {(row.batch, row.context) for row in rates} == {(1, 16), (8, 16), (16, 16), (1, 900), (8, 900)}
    assert all(row.tokens_per_s > 0 for row in rates)
    assert all(row.of_fp32 == 1.0 for row in rates if row.engine == engine.FP32)
    assert {"transformers.generate, batch 1", "transformers.generate, batch 8"} <= set(checks)
    assert checks["CPU time, from_pretrained and slicing / layers 2:4"].measured == 5.0
    assert any("floor" in name for name in checks) and "a step of transformers, batch 8 after 900 tokens" in checks
    console = Console(record=True, width=160)
    engine.show(rows, console)
    text = console.export_text()
    assert "packed=false" in text and "floor" in text
    for note in (row for row in rows if isinstance(row, engine.Note)):
        assert note.text in text


def test_without_transformers_a_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    engines.write_model(tmp_path / "model")
    loaded = engine.load(tmp_path / "model", tmp_path / "work")
    assert set(loaded.generate) == {engine.FP32, engine.PLAIN, engine.INT8}
    assert set(loaded.following) == {engine.FP32, engine.INT8}
    assert [note.text.split(" is not installed")[0] for note in loaded.notes] == ["transformers", *["CTranslate2"] * 2]


def test_a_check_is_met_or_not() -> None:
    assert engine.check("a", 1.1, 1.08, True).ok and not engine.check("a", 1.0, 1.08, True).ok
    assert engine.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == 2.0
