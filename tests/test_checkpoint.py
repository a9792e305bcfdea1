"""The embedded checkpoint is what its record says, and the trainer that made it resumes exactly."""

import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ralmq.demo import corpus, tokens, train
from ralmq.demo.corpus import Document
from ralmq.demo.learner import Run, Settings, TrainingError, bits_per_byte, learning_rate
from ralmq.demo.train import Data, Length
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINT = Path(train.__file__).parent / "checkpoint"
TINY = Settings(
    vocabulary=300, hidden=16, intermediate=24, layers=2, heads=2, kv_heads=1, context=16, batch_rows=2, warmup_steps=2
)
UNSEEN = """shelf.Catalogue.lend(self, book, reader, days=14)

Lend a book to a reader and return the date on which it is due.

If the book is not in the catalogue, a KeyError is raised. The optional
argument days gives the number of days; if it is None, the default value
of the catalogue is used. This method should not be called directly.
"""


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHECKPOINT / "training.json").read_text())
    return found


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return corpus.stdlib_documents()


def small_documents() -> list[Document]:
    words = ["return", "the", "value", "of", "a", "list", "when", "it", "is", "not", "empty", "and", "raise", "an"]
    chosen = random.Random(3)
    texts = [" ".join(chosen.choices(words, k=20)) for _ in range(120)]
    return [Document(f"text{i}", text) for i, text in enumerate(texts)]


@pytest.fixture
def data() -> Data:
    return Data.build(small_documents(), TINY)


def advance_all(run: Run, data: Data, length: Length, state: Path, stop_at: int | None = None) -> bool:
    return train.train(run, data, length, state, lambda run, loss: None, lambda: run.step == stop_at)


def same_weights(left: Run, right: Run) -> bool:
    pairs = zip(left.model.parameters(), right.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_files_hold_what_the_record_says(record: dict[str, Any]) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == record["parameters"]
    assert 2_600_000 <= record["parameters"] <= 4_300_000
    assert 5e6 < sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 9e6
    assert config["model_type"] == "llama" and config["tie_word_embeddings"]
    assert config["num_hidden_layers"] % 2 == 0
    vocabulary = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).get_vocab_size()
    assert vocabulary == config["vocab_size"] == record["settings"]["vocabulary"] == 4096
    steps = record["settings"]["batch_rows"] * record["settings"]["context"]
    assert record["tokens_trained"] == record["steps"] * steps
    assert len(record["corpus_sha256"]) == 64
    assert record["held_out_bits_per_byte"] < 1.95
    assert record["settings"] == asdict(Settings(seed=record["settings"]["seed"]))


def test_recorded_corpus_is_this_one(record: dict[str, Any], stdlib: list[Document]) -> None:
    if (platform.python_version(), sys.platform) != (record["python"], record["platform"]):
        pytest.skip(f"recorded with CPython {record['python']} on {record['platform']}")
    if len(stdlib) != record["corpus_documents"]:
        pytest.skip("this build of CPython lacks modules of the recorded one")
    assert corpus.corpus_hash(stdlib) == record["corpus_sha256"]


@pytest.mark.parametrize(
    "text", [UNSEEN, "a\n\n    b\t\r\n", "naïve Ω 漢字 \U0001f40d", " leading", ">>> x[1:]  # ok\n"]
)
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = tokens.load_tokenizer(CHECKPOINT)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode(text + tokens.END_OF_TEXT).ids[-1] == 0


def test_transformers_loads_it_and_it_predicts() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id == 0
    ids = [0, *tokenizer(UNSEEN)["input_ids"]]
    text_bytes = len(UNSEEN.encode())
    untrained = math.log2(model.config.vocab_size) * (len(ids) - 1) / text_bytes
    measured = bits_per_byte(model, [ids], text_bytes, model.config.max_position_embeddings)
    assert measured < 2.5 < 0.7 * untrained


def test_corpus_is_deterministic_and_without_repeats(stdlib: list[Document]) -> None:
    again = corpus.stdlib_documents()
    assert again == stdlib
    assert corpus.corpus_hash(again) == corpus.corpus_hash(stdlib)
    assert corpus.corpus_hash(stdlib[1:]) != corpus.corpus_hash(stdlib)
    for documents in (stdlib, corpus.numpy_documents()):
        assert len({document.name for document in documents}) == len(documents)
        assert len({document.text.partition("\n\n")[2] for document in documents}) == len(documents)


def test_corpus_covers_topics_docstrings_and_compiled_modules(stdlib: list[Document]) -> None:
    texts = {document.name: document.text for document in stdlib}
    assert texts["str.split"].startswith("str.split(self, /, sep=None, maxsplit=-1)\n\nReturn a list of the substrings")
    assert texts["json.dumps"].startswith("json.dumps(obj, *, skipkeys=False,")
    assert texts["math.sin"].startswith("math.sin(x, /)\n\n")
    assert texts["collections.OrderedDict"].startswith("class collections.OrderedDict(dict)\n\nDictionary")
    assert texts["topics/with"].startswith("help('with')\n\n")
    assert sum(len(text) for text in texts.values()) > 2_000_000
    held_out = corpus.split(stdlib)[1]
    assert 0.01 < len(held_out) / len(stdlib) < 0.03
    assert not any(name.startswith("test.") for name in texts)


def test_numpy_documents_carry_public_names() -> None:
    texts = {document.name: document.text for document in corpus.numpy_documents()}
    assert texts["numpy.zeros"].startswith("numpy.zeros(shape,")
    assert "Return a new array of given shape and type, filled with zeros." in texts["numpy.zeros"]
    assert texts["numpy.linalg.norm"].startswith("numpy.linalg.norm(x, ord=None, axis=None, keepdims=False)\n\nMatrix")
    assert texts["numpy.ndarray.T"].startswith("numpy.ndarray.T\n\nView of the transposed array.")
    assert not any("._" in name.replace(".__", "") or ".tests." in name for name in texts)
    assert sum(len(text) for text in texts.values()) > 1_000_000


def test_missing_numpy_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(corpus.CorpusError, match="pip install numpy"):
        corpus.numpy_documents()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("ralmq.demo.corpus", "torch transformers numpy"), ("ralmq.demo.train", "torch transformers")],
)
def test_importing_costs_nothing(module: str, forbidden: str) -> None:
    calls = "x.numpy_documents()" if module.endswith("corpus") else "pass"
    code = f"import sys, {module} as x; {calls}; sys.exit(bool(set('{forbidden}'.split()) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_rows_predict_every_id_once() -> None:
    texts = [[0, 1, 2, 3], [0, 4, 5], [0, 6, 7, 8, 9]]
    predicted = [token for row in tokens.rows(texts, 5) for token in row[1:]]
    assert predicted == [token for text in texts for token in text][1:]
    shuffled = tokens.rows(texts, 5, random.Random(1))
    assert {len(row) for row in shuffled} == {6}
    assert shuffled == tokens.rows(texts, 5, random.Random(1))


def test_learning_rate_warms_up_stays_and_falls() -> None:
    rates = [learning_rate(step, TINY, (6, 4)) / TINY.learning_rate for step in range(10)]
    assert rates[:6] == [0.5, 1, 1, 1, 1, 1]
    assert all(1 > a > b > 0 for a, b in pairwise(rates[6:]))
    assert learning_rate(9, TINY, None) == TINY.learning_rate


def test_length_in_steps_and_in_minutes() -> None:
    assert Length(steps=10, decay_steps=4).decay(5, 0.0) is None
    assert Length(steps=10, decay_steps=4).decay(6, 0.0) == (6, 4)
    timed = Length(minutes=2.0, decay_minutes=0.5)
    assert timed.decay(40, 80.0) is None
    assert timed.decay(45, 90.0) == (45, 15)
    assert timed.decay(100, 200.0) == (100, 0)


def test_two_steps_resumed_for_two_equal_four(data: Data, tmp_path: Path) -> None:
    straight = Run.start(TINY)
    assert advance_all(straight, data, Length(steps=4), tmp_path / "straight")
    first = Run.start(TINY)
    assert not advance_all(first, data, Length(steps=4), tmp_path / "state", stop_at=2)
    resumed = Run.start(TINY)
    resumed.load(tmp_path / "state", data.corpus_sha256)
    assert (resumed.step, resumed.seconds) == (2, first.seconds)
    assert advance_all(resumed, data, Length(steps=4), tmp_path / "state")
    assert resumed.step == 4 and same_weights(straight, resumed)
    assert not same_weights(first, resumed)


def test_a_longer_run_goes_on_from_before_the_decay(data: Data, tmp_path: Path) -> None:
    short = Run.start(TINY)
    assert advance_all(short, data, Length(steps=5, decay_steps=2), tmp_path / "state")
    longer = Run.start(TINY)
    longer.load(tmp_path / "state", data.corpus_sha256)
    assert longer.step == 3
    advance_all(longer, data, Length(steps=8, decay_steps=2), tmp_path / "state")
    straight = Run.start(TINY)
    advance_all(straight, data, Length(steps=8, decay_steps=2), tmp_path / "other")
    assert same_weights(straight, longer)


def test_a_foreign_state_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="start without --resume"):
        Run.start(TINY).load(tmp_path, data.corpus_sha256)
    run = Run.start(TINY)
    advance_all(run, data, Length(steps=1), tmp_path)
    with pytest.raises(TrainingError, match="other settings or texts"):
        Run.start(TINY).load(tmp_path, "0" * 64)
    with pytest.raises(TrainingError, match="other settings or texts"):
        Run.start(Settings(seed=1)).load(tmp_path, data.corpus_sha256)


def test_too_little_text_is_refused(data: Data) -> None:
    with pytest.raises(TrainingError, match="too few for one batch"):
        Run.start(TINY).batch([[0, 1, 2]])
    with pytest.raises(TrainingError, match="too small to hold documents out"):
        Data.build([Document("one", "text")], TINY)


def test_training_learns_and_exports_what_it_measured(data: Data, tmp_path: Path) -> None:
    run = Run.start(TINY)
    before = bits_per_byte(run.model, data.held_out, data.held_out_bytes, TINY.context)
    advance_all(run, data, Length(steps=60, decay_steps=20), tmp_path / "state")
    made = train.export(run, data, tmp_path / "out")
    assert made["held_out_bits_per_byte"] < 0.7 * before
    assert made["steps"] == 60 and "--steps 60 --decay-steps 20" in made["command"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again = bits_per_byte(model, data.held_out, data.held_out_bytes, TINY.context)
    assert again == pytest.approx(made["held_out_bits_per_byte"], abs=1e-3)


@pytest.fixture
def small_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command on a small model and a small corpus; its signal handlers go when the test ends."""
    monkeypatch.setattr(train, "Settings", lambda seed: replace(TINY, seed=seed))
    monkeypatch.setattr(corpus, "stdlib_documents", small_documents)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def terminate(*_: object) -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    return 0.0


@pytest.mark.usefixtures("small_command")
def test_command_stopped_by_sigterm_goes_on_to_the_same_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ["--steps", "4", "--decay-steps", "1", "--seed", "5"]
    assert train.main([*common, "--out", str(tmp_path / "straight"), "--state", str(tmp_path / "a")]) == 0
    options = [*common, "--evaluate-every", "2", "--out", str(tmp_path / "resumed"), "--state", str(tmp_path / "b")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "bits_per_byte", terminate)
        assert train.main(options) == 0
    assert "stopped at step 2" in capsys.readouterr().out
    assert not (tmp_path / "resumed").exists()
    assert train.main([*options, "--resume"]) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_command_line_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for wrong in (["--out", "x"], ["--out", "x", "--steps", "1", "--minutes", "1"]):
        with pytest.raises(SystemExit) as refused:
            train.main(wrong)
        assert refused.value.code == 2
    monkeypatch.setattr(corpus, "stdlib_documents", lambda: [])
    assert train.main(["--out", str(tmp_path / "out"), "--steps", "1"]) == 2
    assert "too small" in capsys.readouterr().err
