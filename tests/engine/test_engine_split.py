"""Directories of a part of a model: what is in them, and that spans of them are spans of the whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, VOCAB, tiny
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.errors import CheckpointError
from ralmq.workers.engine.headers import Headers
from ralmq.workers.engine.model import ADAPTER
from ralmq.workers.engine.span import Row, Span
from ralmq.workers.engine.split import even_cuts, span_tensors, split
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_the_parts_are_spans_of_the_whole(tmp_path: Path, family: str, shard: str | None) -> None:
    whole = tiny(family, tmp_path / "whole", shard=shard)
    parts = split(whole, 3, tmp_path / "parts")
    assert parts == [tmp_path / "parts" / name for name in ("0", "1", "2")]
    x = y = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(0))
    rows = [Row(0, 9, [0])]
    for part, (first, last) in zip(parts, even_cuts(4, 3), strict=True):
        assert Checkpoint(part).fingerprint() == Checkpoint(whole).fingerprint()
        span, own = Span.load(whole, first, last, blocks=1), Span.load(part, first, last, blocks=1)
        assert read_config(part) == read_config(whole)
        assert own.bytes == span.bytes
        x, y = span.forward(rows, x), own.forward(rows, y)
        assert torch.equal(x, y)
    assert torch.equal(span.head(x), own.head(y))


def test_a_part_holds_its_tensors_alone_and_any_reader_reads_them(tmp_path: Path) -> None:
    whole = tiny("llama", tmp_path / "whole", tie_word_embeddings=True)
    tensors = load_file(whole / "model.safetensors")
    tensors["model.layers.1.odd"] = torch.tensor([1, 2, 3], dtype=torch.int8)
    tensors["model.layers.1.half"] = torch.ones(3, dtype=torch.bfloat16)
    save_file(tensors, whole / "model.safetensors")
    parts = split(whole, 2, tmp_path / "parts")
    read = [load_file(part / "model.safetensors") for part in parts]
    for part in read:
        for name, tensor in part.items():
            assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    assert set(read[0]) & set(read[1]) == {"model.embed_tokens.weight"}
    assert set(read[0]) | set(read[1]) == set(tensors)
    assert "model.norm.weight" in read[1] and "model.norm.weight" not in read[0]
    with safe_open(parts[0] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for entry in map(Checkpoint(parts[0]).entry, Checkpoint(parts[0]).names()):
        assert entry.begin % entry.itemsize == 0


def test_layer_ten_is_not_layer_one(tmp_path: Path) -> None:
    whole = tiny("gpt2", tmp_path, 12)
    names = span_tensors(Checkpoint(whole), read_config(whole), 1, 2)
    assert names and all(name.startswith("transformer.h.1.") for name in names)


def test_a_middle_part_of_a_checkpoint_without_prefix(tmp_path: Path) -> None:
    whole = tiny("gpt2", tmp_path / "whole")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(whole / "model.safetensors").items()}
    save_file(tensors, whole / "model.safetensors")
    parts = split(whole, 4, tmp_path / "parts")
    assert all(name.startswith("h.2.") for name in Checkpoint(parts[2]).names())
    x = torch.randn(3, 64)
    rows = [Row(0, 3, [0])]
    own, span = (Span.load(path, 2, 3, blocks=1) for path in (parts[2], whole))
    assert torch.equal(own.forward(rows, x), span.forward(rows, x))


def test_small_files_go_along_and_weights_do_not(tmp_path: Path) -> None:
    whole = tiny("gpt2", tmp_path / "whole", shard="60KB")
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    for name in (*names, "chat_template.jinja", "pytorch_model.bin", "README.md"):
        (whole / name).write_text(name)
    for part in split(whole, 2, tmp_path / "parts"):
        kept = {file.name for file in part.iterdir()}
        assert kept == {
            *names,
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "ralmq_fingerprint",
        }
        assert (part / "vocab.json").read_text() == "vocab.json"


def test_layers_that_a_part_lacks_are_named(tmp_path: Path) -> None:
    parts = split(tiny("llama", tmp_path / "whole"), 2, tmp_path / "parts")
    cases = ((parts[0], 1, 3, "model.layers.2."), (parts[1], 0, 2, "model.layers.0."), (parts[0], 0, 4, "layers.2"))
    for part, first, last, name in cases:
        with pytest.raises(CheckpointError, match="holds only a part of the model") as caught:
            Span.load(part, first, last, blocks=1)
        assert f"{part}: has no tensor " in str(caught.value) and name in str(caught.value)


def test_a_part_is_split_again_into_nothing_that_it_lacks(tmp_path: Path) -> None:
    parts = split(tiny("llama", tmp_path / "whole"), 2, tmp_path / "parts")
    with pytest.raises(CheckpointError, match="only a part"):
        split(parts[0], 2, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_split(tmp_path: Path) -> None:
    whole = tiny("gpt2", tmp_path / "whole")
    for stages in (0, 5, -1):
        with pytest.raises(CheckpointError, match=f"4 layers split into 1 to 4 stages, not {stages}"):
            split(whole, stages, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(CheckpointError, match="not an empty directory"):
            split(whole, 2, out)
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full" / "file"]
    (tmp_path / "empty").mkdir()
    assert len(split(whole, 2, tmp_path / "empty")) == 2


def test_progress_is_in_bytes_and_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny("gpt2", tmp_path / "whole")
    told: list[tuple[int, int]] = []
    parts = split(whole, 2, tmp_path / "parts", lambda done, total: told.append((done, total)))
    size = sum(e.end - e.begin for part in map(Checkpoint, parts) for e in map(part.entry, part.names()))
    assert told[0] == (0, size) and told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    raw, calls = Headers.raw, []

    def failing(self: Headers, name: str) -> object:
        calls.append(name)
        if len(calls) == 30:
            raise OSError(28, "No space left on device", name)
        return raw(self, name)

    monkeypatch.setattr(Headers, "raw", failing)
    with pytest.raises(OSError, match="No space left"):
        split(whole, 2, tmp_path / "other")
    assert len(calls) == 30 and list((tmp_path / "other").iterdir()) == []


def test_a_family_without_blocks_of_ours_keeps_what_is_in_no_layer_at_both_ends(tmp_path: Path) -> None:
    names = [
        "gpt_neox.embed_in.weight",
        "gpt_neox.layers.0.a",
        "gpt_neox.layers.1.mlp.3.b",
        "gpt_neox.layers.10.c",
        "out",
    ]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "model.safetensors")
    config = read_config(tiny("gpt2", tmp_path / "any", 11))
    foreign = replace(config, family=ADAPTER)
    checkpoint = Checkpoint(tmp_path)
    outside = ["gpt_neox.embed_in.weight", "out"]
    assert span_tensors(checkpoint, foreign, 0, 1) == sorted([*outside, "gpt_neox.layers.0.a"])
    assert span_tensors(checkpoint, foreign, 1, 10) == ["gpt_neox.layers.1.mlp.3.b"]
    assert span_tensors(checkpoint, foreign, 10, 11) == sorted([*outside, "gpt_neox.layers.10.c"])
