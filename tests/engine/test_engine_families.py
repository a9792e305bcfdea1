"""Sliding windows, long rotary positions, half precision and old spellings of each family, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import Chain, random_ids, reference
from checkpoints import CONTEXT, FAMILIES, tiny, tiny_model
from ralmq.workers.engine import step
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.families import Loader
from ralmq.workers.engine.model import Rope
from ralmq.workers.engine.span import Row, Span
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

BOUND = 1e-4
MIXED = ["full_attention", "sliding_attention"]
TABLE = [7, 3, 12, 9, 0, 5, 11, 1]
# Windows of one block, of less, and across blocks; in some layers or in all.
WINDOWED: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 16}),
    ("mistral", {"sliding_window": 5}),
    ("mixtral", {"sliding_window": 23}),
    ("phi3", {"sliding_window": 23}),
    ("qwen2", {"sliding_window": 23, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": 23, "use_sliding_window": True, "max_window_layers": 0}),
    ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["sliding_attention"]}),
    ("qwen3", {"sliding_window": 9, "use_sliding_window": True, "layer_types": MIXED}),
    ("qwen3_moe", {"sliding_window": 9, "use_sliding_window": True}),
    ("gemma2", {"sliding_window": 1}),
    ("gemma2", {"layer_types": None}),
    ("gemma3_text", {"sliding_window": 17}),
    ("gemma3_text", {"layer_types": ["sliding_attention"]}),
]


def made(path: Path, family: str, changes: dict[str, Any]) -> PreTrainedModel:
    model = tiny_model(family, 4, **changes)
    model.save_pretrained(path)
    return model


def edit(path: Path, **changes: Any) -> None:
    """Sets members of config.json; a member set to `...` is dropped."""
    members = {**json.loads((path / "config.json").read_text()), **changes}
    kept = {name: value for name, value in members.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(("family", "changes"), WINDOWED)
def test_a_window_narrower_than_the_sequence(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    model, ids = made(tmp_path, family, changes), random_ids(110)
    expected = reference(model, ids)
    whole = Chain(tmp_path, 1).decode(ids, 70, TABLE)
    assert (whole - expected).abs().max() < BOUND
    for parts in (2, 4):
        assert torch.equal(Chain(tmp_path, parts).decode(ids, 70, TABLE), whole)
    # The window is what makes the difference, or this test would not see it.
    edit(tmp_path, sliding_window=CONTEXT)
    assert (Chain(tmp_path).decode(ids, 70, TABLE) - expected).abs().max() > 100 * BOUND


@pytest.mark.parametrize("first", [0, 1, 3])
def test_which_layers_have_windows_in_the_spelling_of_transformers_4(tmp_path: Path, first: int) -> None:
    changes = {"sliding_window": 23, "use_sliding_window": True, "max_window_layers": first}
    made(tmp_path, "qwen2", changes)
    new = read_config(tmp_path)
    assert new.windows == (0,) * first + (23,) * (4 - first)
    edit(tmp_path, layer_types=...)
    assert read_config(tmp_path) == new
    edit(tmp_path, use_sliding_window=False)
    assert read_config(tmp_path).windows == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_gives_what_it_gives_whole(tmp_path: Path, family: str) -> None:
    """Chunks that begin and end within blocks and windows, beside a row that decodes."""
    path, ids, other = tiny(family, tmp_path), random_ids(90), random_ids(40, seed=1)
    chain = Chain(path, 2)
    whole = chain.logits([Row(0, 90, TABLE)], ids)
    chain = Chain(path, 2)
    beside = [chain.logits([Row(0, 30, [20, 21, 22])], other[:30])]
    pieces, at = [], 0
    for number, count in enumerate((1, 18, 33, 7, 31)):
        rows = [Row(at, count, TABLE), Row(30 + number, 1, [20, 21, 22])]
        both = chain.logits(rows, torch.cat((ids[at : at + count], other[30 + number : 31 + number])))
        pieces.append(both[:count])
        beside.append(both[count:])
        at += count
    assert (torch.cat(pieces) - whole).abs().max() < 1e-5
    assert (torch.cat(beside) - Chain(path).logits([Row(0, 35, [0, 1, 2])], other[:35])).abs().max() < 1e-5


@pytest.mark.parametrize("short", [step.SHORT, 64, 0])  # tokens: all attend together, or some, or none
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gemma2", "llama"])
def test_rows_of_different_lengths_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, short: int
) -> None:
    """Each row's window, if there is one, lies in other blocks; the short row has not yet filled its own."""
    model = made(tmp_path, family, {} if family == "llama" else {"sliding_window": 20})
    config = read_config(tmp_path)
    monkeypatch.setattr(step, "SHORT", short * 2 * config.kv_heads * config.head_dim * 4)
    chain, lengths = Chain(tmp_path, 2), (3, 65, 19, 20, 64, 47, 63, 100)
    ids = [random_ids(n + 1, seed=n) for n in lengths]
    tables = [list(range(8 * i, 8 * i + 8))[::-1] for i in range(8)]
    for n, sequence, table in zip(lengths, ids, tables, strict=True):
        chain.forward([Row(0, n, table)], sequence[:n])
    rows = [Row(n, 1, table) for n, table in zip(lengths, tables, strict=True)]
    got = chain.logits(rows, torch.stack([sequence[-1] for sequence in ids]))
    expected = torch.stack([reference(model, sequence)[-1] for sequence in ids])
    assert (got - expected).abs().max() < BOUND


def test_a_window_reads_the_blocks_that_it_touches_alone(tmp_path: Path) -> None:
    """What an earlier block holds, even NaN, is never read."""
    made(tmp_path, "mistral", {"sliding_window": 20})
    ids, span = random_ids(80), Span.load(tmp_path, 0, 4, blocks=8)
    span.forward([Row(0, 79, [0, 1, 2, 3, 4])], ids[:79])
    row = [Row(79, 1, [0, 1, 2, 3, 4])]
    expected = span.head(span.forward(row, ids[79:]))
    for layer in span._cache._layers:
        layer[:3] = float("nan")  # positions 0-47; the window sees 60-79
    assert torch.equal(span.head(span.forward(row, ids[79:])), expected)


def test_phi3_with_long_rotary_positions_ends_where_the_short_factors_do(tmp_path: Path) -> None:
    factors = [1.0 + 0.1 * i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": [9.0] * 8}
    model = made(tmp_path, "phi3", {"rope_parameters": rope, "original_max_position_embeddings": 64})
    config = read_config(tmp_path)
    assert config.context == 64 and config.ropes[0].amplitude > 1.1
    ids = random_ids(64)
    assert (Chain(tmp_path, 2).decode(ids, 50, TABLE) - reference(model, ids)).abs().max() < BOUND
    rope = {"type": "su", "short_factor": factors, "long_factor": [9.0] * 8}
    edit(tmp_path, rope_parameters=..., rope_scaling=rope, rope_theta=1e4)
    assert read_config(tmp_path) == config


def test_gemma_3_in_the_spelling_of_transformers_4(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 2e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    model, ids = made(tmp_path, "gemma3_text", {"rope_parameters": ropes}), random_ids(60)
    new = read_config(tmp_path)
    assert new.ropes == (Rope(2e4, 32, "linear", 8.0), Rope(300.0, 32))
    assert (Chain(tmp_path, 2).decode(ids, 40, TABLE) - reference(model, ids)).abs().max() < BOUND
    edit(
        tmp_path,
        rope_parameters=...,
        rope_theta=2e4,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=...,
        _sliding_window_pattern=...,
        sliding_window_pattern=2,
    )
    assert read_config(tmp_path) == new


def test_experts_in_the_spelling_of_transformers_4(tmp_path: Path) -> None:
    new = read_config(tiny("qwen3_moe", tmp_path))
    edit(tmp_path, num_local_experts=..., num_experts=4)
    assert read_config(tmp_path) == new
    assert new.experts is not None and new.experts.layers == (0, 1, 2, 3)


def test_every_expert_goes_through_the_same_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what packs or quantizes a matrix does it with those of experts too."""
    path, asked = tiny("mixtral", tmp_path, 1), []
    linear = Loader._linear

    def spy(self: Loader, names: Any, *rest: Any, **more: Any) -> Any:
        asked.extend(names)
        return linear(self, names, *rest, **more)

    monkeypatch.setattr(Loader, "_linear", spy)
    Span.load(path, 0, 1, blocks=1)
    matrices = {name for name in Checkpoint(path).names() if name.endswith(("_proj.weight", "w1.weight", "w2.weight"))}
    assert len(matrices) == 12
    assert matrices <= {f"{name}.weight" for name in asked}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_norms_of_large_activations_stay_finite_in_fp16(tmp_path: Path, family: str) -> None:
    """Squares of what is above 256 overflow in fp16: the norms must sum in fp32."""
    model = tiny_model(family, 2)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.mul_((2000.0 if family == "llama" else 250.0) / weight.abs().max())  # Gemma multiplies by 8
    model.save_pretrained(tmp_path)
    ids, span = random_ids(20), Span.load(tmp_path, 0, 2, dtype="fp16", blocks=2)
    hidden = span.forward([Row(0, 20, [0, 1])], ids)
    expected = reference(model, ids)
    assert hidden.abs().max() > 500
    assert (span.head(hidden) - expected).abs().max() < 0.05 * expected.abs().max()


def test_gemma_scales_embeddings_as_rounded_to_the_weights(tmp_path: Path) -> None:
    """sqrt(hidden) is 9.75 in bf16 for 96, not 9.798: half a per cent of everything."""
    sizes = {"hidden_size": 96}
    model, ids = tiny_model("gemma2", 1, **sizes).to(torch.bfloat16), random_ids(6)
    model.save_pretrained(tmp_path)
    span = Span.load(tmp_path, 0, 1, dtype="bf16", blocks=1)
    seen: list[Tensor] = []
    norm = span._blocks[0].attention_norm
    span._blocks[0].attention_norm = lambda x: (seen.append(x), norm(x))[1]  # type: ignore[func-returns-value]
    span.forward([Row(0, 6, [0])], ids)
    assert torch.equal(seen[0], model.model.embed_tokens(ids))


def test_nanogpt_has_no_biases(tmp_path: Path) -> None:
    """A checkpoint in GPT-2's names whose config says bias = false, as nanoGPT is trained by default."""
    model, ids = tiny_model("gpt2", 3), random_ids(40)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith("bias")}, file)
    edit(tmp_path, bias=False)
    span = Span.load(tmp_path, 0, 3, blocks=3)
    logits = span.head(span.forward([Row(0, 40, [2, 0, 1])], ids))
    assert (logits - reference(model, ids)).abs().max() < 1e-4
