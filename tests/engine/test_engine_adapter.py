"""Architectures without blocks of ours on transformers' own layers, against the whole model in one process."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import Chain, random_ids, reference
from checkpoints import CONTEXT, HIDDEN, VOCAB, tiny, tiny_model
from ralmq.workers.engine.adapter import Adapter
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.errors import CheckpointError
from ralmq.workers.engine.span import Row, Span
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

BOUND = 1e-4
OLD = {"n_layer": 4, "n_head": 4, "n_embd": HIDDEN, "n_positions": CONTEXT}
# Parallel and serial blocks, alibi and rotary and learned positions, one and many kv heads, windows, experts, scales.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"alibi": True},
    "stablelm": {},
    "phi": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 12},
    "granite": {"logits_scaling": 0.5, "embedding_multiplier": 5.0, "residual_multiplier": 0.5},
    "gptj": {**OLD, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_bigcode": OLD,
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "logit_scale": 3.0},
    "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 1, 0, 1]},
    "ctrl": {"dff": 96},  # a tied head that has a bias of its own
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "ffn_dim": 96},
}
Made = tuple[Path, PreTrainedModel]
Make = Callable[[str], Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny checkpoint of an architecture and the model that wrote it, made once."""

    @functools.cache
    def made(family: str) -> Made:
        path = tmp_path_factory.mktemp(family)
        model = tiny_model(family, 4, **ARCHITECTURES.get(family, {}))
        model.save_pretrained(path)
        return path, model

    return made


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_are_those_of_the_whole_model(make: Make, family: str) -> None:
    path, model = make(family)
    ids = random_ids(45, low=3)
    assert read_config(path).family == "adapter"
    whole = Chain(path, 1).decode(ids, 21, [7, 3, 12])
    assert (whole - reference(model, ids)).abs().max() < BOUND
    assert whole.std() > 0.1  # logits that say something
    for parts in (2, 3, 4):
        assert torch.equal(Chain(path, parts).decode(ids, 21, [7, 3, 12]), whole)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rows_of_different_lengths_and_chunks(make: Make, family: str) -> None:
    path, model = make(family)
    lengths, chain = (1, 5, 16, 33), Chain(path, 2)
    ids = [random_ids(n + 1, seed=n, low=3) for n in lengths]
    tables = [list(range(4 * i, 4 * i + 4)) for i in range(4)]
    chain.forward([Row(0, n, t) for n, t in zip(lengths, tables, strict=True)], torch.cat([s[:-1] for s in ids]))
    late = random_ids(40, seed=99, low=3)
    chain.forward([Row(0, 13, [20, 21, 22])], late[:13])
    rows = [Row(n, 1, table) for n, table in zip(lengths, tables, strict=True)]
    rows.insert(2, Row(13, 20, [20, 21, 22]))  # a later chunk of a prompt between rows that decode
    tokens = [sequence[-1:] for sequence in ids]
    tokens.insert(2, late[13:33])
    got = chain.logits(rows, torch.cat(tokens)).split([1, 1, 20, 1, 1])
    expected = [reference(model, sequence)[-1:] for sequence in ids]
    expected.insert(2, reference(model, late)[13:33])
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < BOUND


@pytest.mark.parametrize(("family", "calls"), [("stablelm", 2), ("bloom", 4)])
def test_only_rows_that_are_told_their_positions_share_a_call(
    make: Make, monkeypatch: pytest.MonkeyPatch, family: str, calls: int
) -> None:
    span, ran = Span.load(make(family)[0], 0, 4, blocks=4), []
    run = Adapter._run
    monkeypatch.setattr(Adapter, "_run", lambda self, rows, x: (ran.append(len(rows)), run(self, rows, x)))
    span.forward([Row(0, 1, [0]), Row(0, 5, [1]), Row(0, 1, [2]), Row(0, 1, [3])], random_ids(8, low=3))
    assert len(ran) == calls and sum(ran) == 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "phi3", "mixtral"])
def test_our_own_blocks_agree_with_the_adapter(make: Make, family: str) -> None:
    """Also where only one span of a pipeline has it: hidden states mean the same."""
    path, _ = make(family)
    ids, rows = random_ids(40, low=3), [Row(0, 40, [2, 0, 1])]
    ours = [Span.load(path, first, first + 2, blocks=4) for first in (0, 2)]
    theirs = [Span.load(path, first, first + 2, blocks=4, adapter=True) for first in (0, 2)]
    hidden = ours[0].forward(rows, ids)
    assert (theirs[0].forward(rows, ids) - hidden).abs().max() < BOUND
    (left, entered), (right, there) = (pair[1].forward(rows, hidden, ffn_input=True) for pair in (ours, theirs))
    assert (left - right).abs().max() < BOUND and (entered - there).abs().max() < BOUND
    assert (ours[1].head(left, [3, 39]) - theirs[1].head(right, [3, 39])).abs().max() < BOUND


@pytest.mark.parametrize(("family", "mlp"), [("gpt_neox", "mlp"), ("bloom", "mlp"), ("opt", "fc1")])
def test_ffn_input_is_what_enters_the_last_mlp(make: Make, family: str, mlp: str) -> None:
    path, model = make(family)
    layers = {"gpt_neox": "gpt_neox.layers", "bloom": "transformer.h", "opt": "model.decoder.layers"}[family]
    seen: list[Tensor] = []
    last_mlp = getattr(model.get_submodule(layers)[-1], mlp)
    hook = last_mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].view(-1, HIDDEN)))
    ids = random_ids(30, low=3)
    reference(model, ids)
    hook.remove()
    first, last = Chain(path, 2).spans
    rows = [Row(0, 20, [1, 0]), Row(0, 10, [2])]
    _, entered = last.forward(rows, first.forward(rows, torch.cat((ids[:20], ids[:10]))), ffn_input=True)
    assert (entered - torch.cat((seen[0][:20], seen[0][:10]))).abs().max() < BOUND


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "olmoe"])
def test_a_span_holds_its_own_layers_alone(make: Make, family: str) -> None:
    path, model = make(family)
    parts = [Span.load(path, first, last, blocks=1) for first, last in ((0, 1), (1, 3), (3, 4))]
    parameters = sum(p.numel() for p in model.parameters()) * 4
    embedding = VOCAB * HIDDEN * 4
    assert sum(span.bytes for span in parts) == parameters + (embedding if family == "bloom" else 0)
    for span, count in zip(parts, (1, 2, 1), strict=True):
        assert isinstance(span._adapter, Adapter)
        skeleton = span._adapter._skeleton
        assert len(skeleton.layers) == count
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in skeleton._model.parameters()}
        assert sum(held.values()) < span.bytes + 1000  # what is not its own takes no memory
        assert not any(p.is_meta or p.requires_grad for p in skeleton._model.parameters() if p.numel() == 0)
    assert [(span.is_first, span.is_last) for span in parts] == [(True, False), (False, False), (False, True)]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near(make: Make, dtype: str) -> None:
    path, model = make("stablelm")
    ids, span = random_ids(30, low=3), Span.load(path, 0, 4, dtype=dtype, blocks=4)
    span.forward([Row(0, 29, [1, 0])], ids[:29])
    hidden = span.forward([Row(29, 1, [1, 0])], ids[29:])
    assert hidden.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    logits = span.head(hidden)
    assert logits.dtype == torch.float32
    assert 0 < (logits[0] - reference(model, ids)[-1]).abs().max() < (0.15 if dtype == "bf16" else 0.02)


def test_sizes_blocks_and_progress(make: Make) -> None:
    path, _ = make("falcon")
    told: list[tuple[int, int]] = []
    span = Span.load(path, 0, 3, blocks=5, progress=lambda done, total: told.append((done, total)))
    config = span.config
    assert told == [(done, 3) for done in range(4)]
    assert (config.layers, config.hidden, config.vocab, config.context) == (4, HIDDEN, VOCAB, CONTEXT)
    assert (config.eos_ids, config.bos_id, span.blocks) == ((2,), 1, 5)
    assert span.kv_bytes_per_block == 3 * 16 * 2 * config.kv_heads * config.head_dim * 4
    with pytest.raises(ValueError, match="one of the 5 blocks"):
        span.forward([Row(0, 1, [5])], random_ids(1, low=3))
    with pytest.raises(ValueError, match="only the last span"):
        span.head(torch.zeros(1, HIDDEN))


def test_a_checkpoint_of_the_model_below_the_head(make: Make, tmp_path: Path) -> None:
    """As BLOOM is published: no tensor has the prefix of the language model."""
    path, model = make("bloom")
    model.base_model.save_pretrained(tmp_path)
    assert "h.0.input_layernorm.weight" in Checkpoint(tmp_path)
    ids = random_ids(20, low=3)
    assert torch.equal(Chain(tmp_path, 2).decode(ids, 20, [0, 1]), Chain(path, 2).decode(ids, 20, [0, 1]))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mamba", {}, "model_type 'mamba' "),
        ("rwkv", {"attention_hidden_size": HIDDEN}, "model_type 'rwkv' "),
        (
            "jamba",
            {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 8},
            "model_type 'jamba' does not run on keys and values alone",
        ),
        (
            "stablelm",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "has dynamic rotary positions",
        ),
        ("bart", {}, "model_type 'bart' is no text decoder alone"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    if family == "bart":
        members = {"model_type": "bart", "encoder_layers": 2}
        (tmp_path / "config.json").write_text(json.dumps(members))
    else:
        tiny(family, tmp_path, 2, **changes)
    with pytest.raises(CheckpointError) as caught:
        Span.load(tmp_path, 0, 2, blocks=1)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_layers_that_need_the_embeddings_again_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later span has no embeddings: an architecture that hands them to its layers must not run wrongly."""
    path, model = make("stablelm")
    kind = type(model.base_model.layers[0])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, again=None, **named: forward(self, x, **named))
    base = type(model.base_model)
    run = base.forward

    def handing(self: Any, *args: Any, **named: Any) -> Any:
        more = {"again": self.embed_tokens(named["input_ids"])}
        hooks = [
            layer.register_forward_pre_hook(lambda m, a, k: (a, {**k, **more}), with_kwargs=True, prepend=True)
            for layer in self.layers
        ]
        try:
            return run(self, *args, **named)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(base, "forward", handing)
    with pytest.raises(CheckpointError, match="gives its layers more than hidden states"):
        Span.load(path, 0, 2, blocks=1)


def test_a_missing_tensor_is_named(make: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = make("gpt_neox")
    tensors = load_file(path / "model.safetensors")
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    Span.load(tmp_path, 2, 4, blocks=1)
    with pytest.raises(CheckpointError, match=r"has no tensor gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"):
        Span.load(tmp_path, 0, 2, blocks=1)


def test_without_transformers_the_line_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make("gpt_neox")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"run: pip install 'ralmq\[hf\]'"):
        read_config(path)


def test_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(CheckpointError, match=r"config\.json: transformers does not read it"):
        read_config(tmp_path)


def test_nothing_of_the_oracle_is_ours(make: Make) -> None:
    """The reference of these tests is the checkpoint as transformers itself loads it."""
    path, model = make("gpt_neox")
    ids = random_ids(9, low=3)
    assert torch.equal(reference(AutoModelForCausalLM.from_pretrained(path).eval(), ids), reference(model, ids))
