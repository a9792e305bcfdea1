"""What a span reads of a checkpoint, what it holds then, and that every form of its matrices gives the same tokens."""

import json
import subprocess
import sys
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import reference
from checkpoints import FAMILIES, HIDDEN, VOCAB, tiny, tiny_model
from ralmq.workers.engine import checkpoint, families, linear
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.int8 import Int8
from ralmq.workers.engine.linear import Blocked, Linear, Packed, Plain
from ralmq.workers.engine.names import HEAD
from ralmq.workers.engine.span import Row, Span
from ralmq.workers.engine.split import even_cuts, span_tensors, split
from ralmq.workers.models import resolve
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

FORMS: list[dict[str, Any]] = [{}, {"packed": True}, {"dtype": "int8"}, {"dtype": "int8", "packed": True}]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def logits(spans: list[Span], ids: torch.Tensor) -> torch.Tensor:
    """[n, vocab] of one sequence, the last token in a step of its own."""
    table = list(range(8))
    out = []
    for row, x in ((Row(0, len(ids) - 1, table), ids[:-1]), (Row(len(ids) - 1, 1, table), ids[-1:])):
        for span in spans:
            x = span.forward([row], x)
        out.append(spans[-1].head(x))
    return torch.cat(out)


@pytest.fixture
def every_form(monkeypatch: pytest.MonkeyPatch) -> list[type[Linear]]:
    """Lets matrices of tiny models take the forms of large ones, and lists which they took."""
    monkeypatch.setattr(linear, "WORTH", 1)
    monkeypatch.setattr(linear, "blas_blocks", lambda: True)
    made: list[type[Linear]] = []
    counted = families.Loader._counted

    def count(self: families.Loader, matrix: Linear) -> Linear:
        made.append(type(matrix))
        return counted(self, matrix)

    monkeypatch.setattr(families.Loader, "_counted", count)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_family(
    tmp_path: Path, every_form: list[type[Linear]], family: str, form: dict[str, Any]
) -> None:
    path = tiny(family, tmp_path)
    ids = random_ids(20)
    config = read_config(path)
    plain = logits([Span.load(path, 0, config.layers, blocks=8)], ids)
    every_form.clear()
    got = logits([Span.load(path, first, last, blocks=8, **form) for first, last in even_cuts(4, 2)], ids)
    assert set(every_form) == {Int8 if "dtype" in form else Blocked if "packed" in form else Plain}
    if "dtype" in form:
        assert 0 < (got - plain).norm() / plain.norm() < 0.25  # tiny random weights forgive little
    else:
        assert (got - plain).abs().max() < 1e-4
    whole = logits([Span.load(path, 0, config.layers, blocks=8, **form)], ids)
    assert torch.equal(whole, got)  # splitting changes no bit, tied heads in one span or in two included


def test_with_more_threads_matrices_are_packed_for_onednn(tmp_path: Path, every_form: list[type[Linear]]) -> None:
    if not linear.onednn_packs():
        pytest.skip("this torch packs nothing")
    path = tiny("gpt2", tmp_path)
    ids = random_ids(20)
    plain = logits([Span.load(path, 0, 4, blocks=8)], ids)
    every_form.clear()
    torch.set_num_threads(2)
    try:
        got = logits([Span.load(path, 0, 4, blocks=8, packed=True)], ids)
    finally:
        torch.set_num_threads(1)
    assert set(every_form) == {Packed}
    assert (got - plain).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_bytes_asked_for_are_those_of_its_own_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, form: dict[str, Any]
) -> None:
    path = tiny(family, tmp_path, tie_word_embeddings=tied)
    config, whole = read_config(path), Checkpoint(path)
    opened: list[Checkpoint] = []
    located = Checkpoint._locate

    def spy(self: Checkpoint) -> dict[str, Path]:
        opened.append(self)
        return located(self)

    monkeypatch.setattr(Checkpoint, "_locate", spy)
    for cuts in ([(0, 4)], [(0, 1), (1, 3), (3, 4)]):
        for first, last in cuts:
            opened.clear()
            Span.load(path, first, last, blocks=1, **form)
            own = [whole.entry(name) for name in span_tensors(whole, config, first, last)]
            assert len(opened) == 1
            assert opened[0].read == sum(entry.end - entry.begin for entry in own)


def test_shards_without_its_tensors_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama", tmp_path, shard="60KB")
    whole, config = Checkpoint(path), read_config(path)
    files = {name: whole._files[name] for name in whole.names()}
    opened: set[Path] = set()
    path_open = Path.open

    def spy(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.add(self)
        return path_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", spy)
    for first, last in even_cuts(4, 4):
        opened.clear()
        Span.load(path, first, last, blocks=1)
        own = {files[name] for name in span_tensors(whole, config, first, last)}
        assert {file for file in opened if file.suffix == ".safetensors"} == own
        assert len(own) < len(set(files.values()))


def test_pieces_of_a_tensor_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SLAB", 4096)
    monkeypatch.setattr(checkpoint, "ALIGNED", 8)
    path = tiny("gpt2", tmp_path, vocab_size=77)
    read = Checkpoint(path)
    for name in read.names():
        tensor = read.get(name)
        shape = tuple(tensor.shape)
        for whole in (False, True):
            pieces = [(start, rows.clone()) for start, rows in read.slabs(name, shape, whole=whole)]
            assert [start for start, _ in pieces] == [i * len(pieces[0][1]) for i in range(len(pieces))]
            assert torch.equal(torch.cat([rows for _, rows in pieces]), tensor)
        assert b"".join(read.raw(name)) == tensor.numpy().tobytes()
    assert len(list(read.slabs("transformer.wte.weight", (77, HIDDEN)))) == 5
    ids = random_ids(12) % 77
    expected = logits([Span.load(path, 0, 4, blocks=8)], ids)
    monkeypatch.undo()
    assert torch.equal(logits([Span.load(path, 0, 4, blocks=8)], ids), expected)


PEAK = """
import sys, torch
from ralmq.workers.engine.span import Span
torch.set_num_threads(1)
Span.load(sys.argv[2], 0, 1, blocks=1)  # what torch allocates once
def resident(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = resident("VmRSS")
span = Span.load(sys.argv[1], 0, 4, dtype=sys.argv[3], blocks=64)
print((resident("VmHWM") - before) / (span.bytes + span.kv_bytes_per_block * span.blocks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loading_needs_hardly_more_memory_than_the_tensors(tmp_path: Path, family: str, dtype: str) -> None:
    big = {"n_embd": 768} if family == "gpt2" else {"hidden_size": 768, "intermediate_size": 3072}
    path = tiny(family, tmp_path / "big", vocab_size=8000, tie_word_embeddings=False, **big)
    small = tiny(family, tmp_path / "small")
    command = [sys.executable, "-c", PEAK, str(path), str(small), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert 0.9 < float(done.stdout) <= 1.15


def test_int8_leaves_the_embedded_model_as_good_as_it_was() -> None:
    _, path = resolve("demo")
    text = " ".join((str.format.__doc__ or "", dict.__doc__ or "", str.split.__doc__ or "", int.__doc__ or "", PROSE))
    ids = torch.tensor(Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids[:500])
    assert len(ids) > 300
    perplexities = []
    for form in FORMS:
        span = Span.load(path, 0, read_config(path).layers, blocks=32, **form)
        row = Row(0, len(ids), list(range(32)))
        with torch.inference_mode():
            scores = span.head(span.forward([row], ids))[:-1]
        perplexities.append(exp(float(torch.nn.functional.cross_entropy(scores, ids[1:]))))
    fp32, packed, tiles, quantized = perplexities
    assert packed == pytest.approx(fp32, rel=1e-5)
    assert tiles < fp32 * 1.01 and quantized < fp32 * 1.01
    assert tiles != fp32 and quantized != tiles


PROSE = """
Return a list of the words in the string, using sep as the delimiter string. The remove() method raises an error when
the value does not exist. If a key function is given, apply it once to each list item and sort them, ascending or
descending, according to their function values. Raises ValueError if the value is not present. When the file is opened
for reading, the encoding is used to decode it; the default encoding is platform dependent. The result is an iterator
over the items of the mapping, in the order in which they were inserted. Return the number of bytes that were written.
The optional argument specifies how many arguments are taken; any further argument is passed to the function when it is
called. A class can be derived from another class, and the method of the derived class is then called first.
"""


def test_a_half_precision_model_is_quantized_from_what_it_holds(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "half")
    ids = random_ids(20)
    fp32, int8 = (
        logits([Span.load(tmp_path / "half", 0, 4, blocks=8, dtype=dtype)], ids) for dtype in ("fp32", "int8")
    )
    assert 0 < (int8 - fp32).norm() / fp32.norm() < 0.25


def test_embedding_and_norms_stay_fp32_with_int8(tmp_path: Path) -> None:
    path = tiny("gpt2", tmp_path)
    fp32, int8 = (Span.load(path, 0, 4, blocks=8, dtype=dtype) for dtype in ("fp32", "int8"))
    ids = random_ids(9)
    assert fp32.embedding is not None and int8.embedding is not None
    assert torch.equal(fp32.embedding(ids), int8.embedding(ids))
    assert int8.dtype == torch.float32 and isinstance(int8.output, Int8)
    assert int8.kv_bytes_per_block == fp32.kv_bytes_per_block


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2"])
def test_a_head_that_is_stored_is_used_whatever_the_config_says(tmp_path: Path, family: str, adapter: bool) -> None:
    """As transformers does where a tied model has another matrix there."""
    path, ids = tiny(family, tmp_path, tie_word_embeddings=False), random_ids(20)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    expected = reference(model, ids)
    assert read_config(path).tied and HEAD in span_tensors(Checkpoint(path), read_config(path), 2, 4)
    for cuts in ([(0, 4)], [(0, 2), (2, 4)]):
        spans = [Span.load(path, first, last, blocks=8, adapter=adapter) for first, last in cuts]
        assert (logits(spans, ids) - expected).abs().max() < 1e-4
    if not adapter:
        parts = split(path, 2, tmp_path / "parts")
        spans = [Span.load(part, *cut, blocks=8) for part, cut in zip(parts, even_cuts(4, 2), strict=True)]
        assert (logits(spans, ids) - expected).abs().max() < 1e-4
