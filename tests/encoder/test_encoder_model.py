"""Vectors equal transformers' hidden states, pooled; what would be computed wrongly is refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder.encoders import CONTEXT, WORDS, oracle, write
from ralmq.workers.encoder.model import MODEL_TYPES, load_encoder, read_encoder
from ralmq.workers.encoder.settings import Settings, read_settings
from ralmq.workers.engine.config import ENCODERS, read_config
from ralmq.workers.engine.errors import CheckpointError
from safetensors.torch import load_file, save_file

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def rows(count: int = 9) -> list[list[int]]:
    """Token ids of texts from 1 token to the whole context."""
    draw = random.Random(5)
    lengths = [1, CONTEXT, *(draw.randint(2, CONTEXT) for _ in range(count - 2))]
    return [[2, *(draw.randrange(4, len(WORDS)) for _ in range(length - 1))] for length in lengths]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("mean", False), ("cls", True), ("cls", False)])
def test_equal_to_transformers(tmp_path: Path, family: str, pooling: Any, normalize: bool) -> None:
    """All texts in one padded batch, against each alone."""
    path = write(tmp_path / "m", family, pad_token_id=0 if family == "bert" else 1)
    found = load_encoder(path)(rows(), pooling, normalize)
    wanted = oracle(path, rows(), pooling, normalize)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-5
    assert float((wanted[0] - wanted[1]).abs().max()) > 1e-2, "the oracle tells texts apart"


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations(tmp_path: Path, activation: str) -> None:
    path = write(tmp_path / "m", hidden_act=activation, layer_norm_eps=1e-5)
    found = load_encoder(path)(rows(), "mean", False)
    assert float((found - oracle(path, rows(), "mean", False)).abs().max()) < 1e-5


def test_names_of_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    """The first BERT checkpoints: everything under `bert.`, norms as gamma and beta, a head beside it, in fp16."""
    path = write(tmp_path / "m")
    wanted = load_encoder(path)(rows(), "mean", False)
    tensors = load_file(path / "model.safetensors")
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    save_file({**old, "cls.predictions.bias": torch.zeros(3)}, path / "model.safetensors")
    assert torch.equal(load_encoder(path)(rows(), "mean", False), wanted)
    save_file({name: value.half() for name, value in old.items()}, path / "model.safetensors")
    assert (
        float((load_encoder(path)(rows(), "mean", True) - wanted / wanted.norm(dim=1, keepdim=True)).abs().max()) < 0.01
    )


@pytest.mark.parametrize("given", [[], [[]], [[2], []], [[2] * (CONTEXT + 1)], [[len(WORDS)]], [[-1]]])
def test_rows_that_cannot_be(tmp_path: Path, given: list[list[int]]) -> None:
    encoder = load_encoder(write(tmp_path / "m"))
    with pytest.raises(ValueError, match="must"):
        encoder(given, "mean", True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is no encoder served here; use one of bert, roberta"),
        ({"model_type": None}, "model_type None"),
        ({"position_embedding_type": "relative_key"}, "not computed"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is unknown"),
        ({"max_position_embeddings": 1}, "no room"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=said) as caught:
        read_encoder(path)
    assert str(path / "config.json") in str(caught.value)


def test_every_tensor_is_needed_and_has_its_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "m", num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    used = [name for name in tensors if not name.startswith("pooler.")]
    assert len(used) == 21
    for name in used:
        save_file({other: value for other, value in tensors.items() if other != name}, path / "model.safetensors")
        with pytest.raises(CheckpointError, match="has no tensor"):
            load_encoder(path)
        save_file({**tensors, name: tensors[name][:-1].clone()}, path / "model.safetensors")
        with pytest.raises(CheckpointError, match="has shape"):
            load_encoder(path)


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 32}, "cls"),
    ],
)
def test_settings_of_a_sentence_transformers_directory(tmp_path: Path, pooling: dict[str, Any], wanted: str) -> None:
    files = {"modules.json": MODULES, "1_Pooling/config.json": pooling}
    path = write(tmp_path / "m", files={**files, "sentence_bert_config.json": {"max_seq_length": 16}})
    assert read_settings(path, 24) == Settings(wanted, 16)  # type: ignore[arg-type]
    assert read_settings(path, 12) == Settings(wanted, 12)  # type: ignore[arg-type]
    assert read_settings(path, 24, "mean") == Settings("mean", 16)


def test_settings_of_a_plain_directory(tmp_path: Path) -> None:
    path = write(tmp_path / "m", files={"tokenizer_config.json": {"model_max_length": 1e30}})
    assert read_settings(path, 24) == Settings("mean", 24)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"modules.json": [MODULES[0], {"type": "sentence_transformers.models.Dense"}]}, "a Dense layer"),
        ({"modules.json": {"not": "a list"}}, "no list of modules"),
        ({"modules.json": [{"type": "x.Pooling", "path": "../elsewhere"}]}, "no folder of this directory"),
        ({"modules.json": MODULES}, "1_Pooling/config.json: no such file"),
        ({"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "max_tokens, which"),
        ({"modules.json": MODULES, "1_Pooling/config.json": {}}, "the pooling none"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_settings(write(tmp_path / "m", files=files), 24)


def test_what_is_served_here_is_said_where_a_language_model_is_wanted(tmp_path: Path) -> None:
    """Another list, since the engine knows no worker: they say the same."""
    assert set(ENCODERS) == set(MODEL_TYPES)
    path = write(tmp_path / "e")
    with pytest.raises(CheckpointError, match=f"serve it with `ralmq worker encoder -o model={path}`"):
        read_config(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    assert read_config(path).layers == config["num_hidden_layers"]
