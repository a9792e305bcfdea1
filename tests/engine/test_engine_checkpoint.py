"""Reading model directories: configs in both spellings, tensors, fingerprints, and one clear line for each bad one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONTEXT, FAMILIES, HIDDEN, VOCAB, tiny
from ralmq.workers.engine.checkpoint import Checkpoint
from ralmq.workers.engine.config import read_config
from ralmq.workers.engine.errors import CheckpointError
from ralmq.workers.engine.model import Rope
from ralmq.workers.engine.span import Row, Span
from safetensors.torch import load_file, save_file


def edit(file: Path, **changes: Any) -> None:
    """Sets members of a JSON file; a member set to `...` is dropped."""
    members = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in members.items() if value is not ...}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), 2)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_every_family(tmp_path: Path, family: str) -> None:
    config = read_config(tiny(family, tmp_path))
    assert (config.layers, config.hidden, config.vocab, config.context) == (4, HIDDEN, VOCAB, CONTEXT)
    old = family in ("gpt2", "opt")
    assert (config.heads, config.kv_heads) == (4, 4 if old else 2)
    assert config.head_dim == (32 if family in ("qwen3", "gemma2", "gemma3_text") else 16)
    assert config.intermediate == (256 if family == "gpt2" else 96)
    own = {"mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gemma2": "gemma", "gemma3_text": "gemma"}
    assert config.family == own.get(family, family)
    assert config.qk_norm is (family in ("qwen3", "gemma3_text", "qwen3_moe"))
    assert config.qkv_bias is (old or family == "qwen2")
    assert config.tied is (old or family.startswith("gemma"))
    assert len(config.ropes) == (0 if old else 2 if family == "gemma3_text" else 1)
    assert config.windows == ((12, 0, 12, 0) if family.startswith("gemma") else ())
    assert (config.eos_ids, config.bos_id) == ((2,), 1)


def test_both_spellings_of_transformers_give_the_same_config(copy: Path) -> None:
    edit(copy / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    new = read_config(copy)
    edit(copy / "config.json", rope_parameters=..., rope_theta=500.0, rope_scaling=None, torch_dtype="float32")
    assert read_config(copy) == new
    assert new.ropes == (Rope(500.0, 16),)
    for key in ("rope_type", "type"):
        edit(copy / "config.json", rope_scaling={key: "linear", "factor": 2.0})
        assert read_config(copy).ropes == (Rope(500.0, 16, "linear", 2.0),)


def test_end_ids_come_from_both_files(copy: Path) -> None:
    edit(copy / "config.json", eos_token_id=[5, 2])
    edit(copy / "generation_config.json", eos_token_id=[2, 7])
    assert read_config(copy).eos_ids == (5, 2, 7)
    (copy / "generation_config.json").unlink()
    edit(copy / "config.json", eos_token_id=None, bos_token_id=...)
    assert (read_config(copy).eos_ids, read_config(copy).bos_id) == ((), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ...}, "model_type is None where a name is needed; use one of gpt2, opt, llama"),
        ({"hidden_size": ...}, "hidden_size is None where a positive integer"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small' where a positive number"),
        ({"attention_bias": 1}, "attention_bias is 1 where true or false"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is unknown"),
        ({"hidden_act": ["silu"]}, "is unknown"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>' where a token id"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 4.0}}, "rope_parameters 'ntk' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None where a positive number"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 7}}, "where 8 positive numbers"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic"}}, "rope_scaling 'dynamic' is not supported"),
        ({"rope_parameters": 3}, "rope_parameters is 3 where an object"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "gives 3 rotary dimensions"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window is 'wide'"),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "layer_types": ["chunked"]},
            "layer_types is ['chunked'] where full_attention or sliding_attention",
        ),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}, "is more than the 4 experts"),
    ],
)
def test_a_config_that_the_engine_would_get_wrong(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit(copy / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        read_config(copy)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(copy / "config.json"))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"n_head": 5},
        {"activation_function": "swish2"},
    ],
)
def test_a_gpt2_that_the_engine_would_get_wrong(tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny("gpt2", tmp_path, 1)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        read_config(tmp_path)


def test_windows_that_hide_nothing_are_fine(copy: Path) -> None:
    edit(copy / "config.json", model_type="qwen2", sliding_window=100, use_sliding_window=False)
    assert read_config(copy).context == CONTEXT
    edit(copy / "config.json", model_type="mistral", sliding_window=100, max_position_embeddings=100)
    assert read_config(copy).context == 100


def damage_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def damage_list(path: Path) -> None:
    (path / "config.json").write_text("[]")


def damage_cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 200)


def damage_tiny(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"abc")


def damage_offsets(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def damage_missing_tensor(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def damage_shape(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


def damage_vocab(path: Path) -> None:
    edit(path / "config.json", vocab_size=100)


def damage_dtype(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(HIDDEN).to(torch.float8_e5m2)}))


def index(path: Path, members: dict[str, Any]) -> None:
    """Its one file becomes a shard, which an index may name."""
    (path / "model.safetensors").rename(path / "shard.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(members))


def damage_shard_map(path: Path) -> None:
    index(path, {"weight_map": {"a": "../secret.safetensors"}})


def damage_no_map(path: Path) -> None:
    index(path, {})


def damage_missing_shard(path: Path) -> None:
    index(path, {"weight_map": dict.fromkeys(Checkpoint(path).names(), "absent.safetensors")})


def damage_lying_index(path: Path) -> None:
    names = Checkpoint(path).names()
    damage_missing_tensor(path)
    index(path, {"weight_map": dict.fromkeys(names, "shard.safetensors")})


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (lambda path: shutil.rmtree(path), "config.json", "no such file"),
        (lambda path: (path / "config.json").unlink(), "config.json", "no such file"),
        (damage_config, "config.json", "not readable as JSON"),
        (damage_list, "config.json", "no JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), "", "holds no *.safetensors file"),
        (damage_cut, "model.safetensors", "cut off or damaged"),
        (damage_header, "model.safetensors", "the header is longer than the file"),
        (damage_tiny, "model.safetensors", "the header is longer than the file"),
        (damage_offsets, "model.safetensors", "outside the file"),
        (damage_missing_tensor, "", "has no tensor model.layers.1.mlp.up_proj.weight"),
        (damage_shape, "model.safetensors", "tensor model.norm.weight has shape [3] where config.json asks for [64]"),
        (damage_vocab, "model.safetensors", "tensor model.embed_tokens.weight has shape [128, 64]"),
        (damage_dtype, "model.safetensors", "tensor model.norm.weight has dtype F8_E5M2"),
        (damage_shard_map, "model.safetensors.index.json", "outside its directory"),
        (damage_no_map, "model.safetensors.index.json", "no weight_map"),
        (damage_missing_shard, "absent.safetensors", "download this shard too"),
        (damage_lying_index, "shard.safetensors", "although the index names it"),
    ],
)
def test_a_damaged_directory_is_named_in_one_line(
    copy: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    damage(copy)
    with pytest.raises(CheckpointError) as caught:
        Span.load(copy, 0, 2, blocks=1)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(copy / file))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_whole_file_counts_whatever_lies_beside_it(copy: Path, llama: Path) -> None:
    """As for transformers: what an earlier save has left there, or a file of the same names."""
    other = {name: tensor + 1 for name, tensor in load_file(llama / "model.safetensors").items()}
    save_file(other, copy / "model_old.safetensors")
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")})
    )
    assert Checkpoint(copy).fingerprint() == Checkpoint(llama).fingerprint()
    ids, rows = torch.arange(10), [Row(0, 10, [0])]
    expected = Span.load(llama, 0, 2, blocks=1).forward(rows, ids)
    assert torch.equal(Span.load(copy, 0, 2, blocks=1).forward(rows, ids), expected)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such directory; give a Hugging Face"):
        Checkpoint(tmp_path / "absent")


def test_tensors_are_read_as_safetensors_reads_them(copy: Path) -> None:
    half = torch.randn(3, 5).to(torch.bfloat16)
    empty = torch.empty(0, 4)
    rewrite(copy, lambda tensors: tensors.update({"half": half, "empty": empty, "scalar": torch.tensor(7)}))
    expected = load_file(copy / "model.safetensors")
    checkpoint = Checkpoint(copy)
    assert checkpoint.names() == sorted(expected)
    for name, tensor in expected.items():
        got = checkpoint.get(name, tuple(tensor.shape))
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)
    assert "half" in checkpoint and "quarter" not in checkpoint


def test_fingerprint_is_of_the_model_and_not_of_its_files(tmp_path: Path) -> None:
    whole = Checkpoint(tiny("qwen3", tmp_path / "whole")).fingerprint()
    sharded = tiny("qwen3", tmp_path / "sharded", shard="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert len(whole) == 16 and int(whole, 16) > 0
    assert Checkpoint(sharded).fingerprint() == whole
    edit(sharded / "config.json", eos_token_id=9, transformers_version="0")
    assert Checkpoint(sharded).fingerprint() == whole
    assert Checkpoint(tiny("qwen3", tmp_path / "other", seed=1)).fingerprint() != whole
    edit(sharded / "config.json", rms_norm_eps=1e-5)
    assert Checkpoint(sharded).fingerprint() != whole


@pytest.mark.parametrize("place", [0, -1])
def test_fingerprint_changes_with_either_end_of_a_tensor(copy: Path, llama: Path, place: int) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[place] += 1

    rewrite(copy, nudge)
    assert Checkpoint(copy).fingerprint() != Checkpoint(llama).fingerprint()


def test_fingerprint_changes_with_dtype_name_and_shape(copy: Path, llama: Path) -> None:
    original = Checkpoint(llama).fingerprint()
    seen = {original}
    changes: list[Callable[[dict[str, torch.Tensor]], Any]] = [
        lambda tensors: tensors.update({"extra": torch.zeros(2)}),
        lambda tensors: tensors.update({"extra": torch.zeros(2, 1)}),
        lambda tensors: tensors.update({"extra": torch.zeros(2, 1, dtype=torch.int32)}),
        lambda tensors: tensors.update({"extra2": tensors.pop("extra")}),
    ]
    for change in changes:
        rewrite(copy, change)
        seen.add(Checkpoint(copy).fingerprint())
    assert len(seen) == 5
    rewrite(copy, lambda tensors: tensors.pop("extra2"))
    assert Checkpoint(copy).fingerprint() == original


def test_a_stored_fingerprint_wins(copy: Path) -> None:
    (copy / "ralmq_fingerprint").write_text("0123456789abcdef\n")
    (copy / "model.safetensors").rename(copy / "part.safetensors")
    assert Checkpoint(copy).fingerprint() == "0123456789abcdef"
    (copy / "ralmq_fingerprint").write_text("yes")
    with pytest.raises(CheckpointError, match="ralmq_fingerprint: is not 16 hex digits; delete it"):
        Checkpoint(copy).fingerprint()


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_names_without_the_prefix_of_the_language_model(tmp_path: Path, family: str, prefix: str) -> None:
    """As in the first published GPT-2, which also stores its masks."""
    path = tiny(family, tmp_path, 2, tie_word_embeddings=True)
    ids, rows = torch.arange(10), [Row(0, 10, [0])]
    expected = Span.load(path, 0, 2, blocks=1).forward(rows, ids)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path / "model.safetensors")
    assert torch.equal(Span.load(path, 0, 2, blocks=1).forward(rows, ids), expected)
