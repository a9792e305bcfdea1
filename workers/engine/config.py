"""What a decoder-only model is, as one flat record read from a Hugging Face config.json; knows no tensor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
MODEL_TYPES = ("gpt2", *LLAMA_LIKE)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched: "linear" (all by `factor`) or "llama3" (low frequencies only)."""

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. `family` names the tensor layout; everything else is a switch on the same block."""

    family: str  # "gpt2": LayerNorm, learned positions, plain MLP; "llama": RMSNorm, rotary positions, gated MLP
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int  # positions the model knows
    norm_eps: float
    activation: str
    tied: bool  # the head is the embedding
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None


class _Fields:
    """The members of one JSON object, each asked for with its type; a fault names file and member."""

    def __init__(self, path: Path, members: Mapping[str, Any]) -> None:
        self.path = path
        self.members = members

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.members.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(f"{name} is {value!r} where a positive integer is needed; mend it in this file")
        return value

    def real(self, name: str, default: float) -> float:
        value = self.members.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(f"{name} is {value!r} where a positive number is needed; mend it in this file")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.members.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(f"{name} is {value!r} where true or false is needed; mend it in this file")
        return value

    def activation(self, name: str, default: str) -> str:
        value = self.members.get(name) or default
        if value not in ACTIVATIONS:
            raise self.fail(f"{name} {value!r} is unknown; use a model with one of {', '.join(ACTIVATIONS)}")
        return str(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.members.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise self.fail(f"{name} is {value!r} where a token id or a list of them is needed; mend it in this file")
        return tuple(values)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory; CheckpointError if it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; give a Hugging Face model directory (config.json, *.safetensors)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download or write the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download or write the file again")
    return value


def read_config(path: Path) -> ModelConfig:
    """The model that a Hugging Face directory describes, in the spellings of transformers 4 and 5.

    Raises CheckpointError for a missing or broken config.json and for every feature that the engine would get wrong.
    """
    fields = _Fields(path / "config.json", read_json(path / "config.json"))
    model_type = fields.members.get("model_type")
    if model_type not in MODEL_TYPES:
        raise fields.fail(f"model_type {model_type!r} is unknown; use one of {', '.join(MODEL_TYPES)}")
    if fields.members.get("quantization_config") is not None:
        raise fields.fail(
            "quantized checkpoints (quantization_config) are not read; use the model in fp32, bf16 or fp16"
        )
    eos_ids = fields.token_ids("eos_token_id")
    generation = path / "generation_config.json"
    if generation.exists():
        eos_ids += _Fields(generation, read_json(generation)).token_ids("eos_token_id")
    bos_ids = fields.token_ids("bos_token_id")
    stops = tuple(dict.fromkeys(eos_ids))
    bos_id = bos_ids[0] if bos_ids else None
    read = _gpt2 if model_type == "gpt2" else _llama
    return read(fields, stops, bos_id)


def _gpt2(fields: _Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> ModelConfig:
    for name, needed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if fields.flag(name, needed) is not needed:
            raise fields.fail(f"{name} = {not needed} is not supported; use a model without it")
    hidden = fields.integer("n_embd")
    heads = fields.integer("n_head")
    if hidden % heads:
        raise fields.fail(f"n_embd {hidden} is no multiple of n_head {heads}; mend one of them in this file")
    return ModelConfig(
        family="gpt2",
        layers=fields.integer("n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=fields.integer("n_inner", 4 * hidden),
        vocab=fields.integer("vocab_size"),
        context=fields.integer("n_positions", 1024),
        norm_eps=fields.real("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        tied=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def _llama(fields: _Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> ModelConfig:
    model_type = fields.members["model_type"]
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    head_dim = fields.integer("head_dim", hidden // heads)
    context = fields.integer("max_position_embeddings", 2048)
    if heads % kv_heads:
        raise fields.fail(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}; mend one of them here"
        )
    if head_dim % 2:
        raise fields.fail(f"head_dim {head_dim} is odd, which rotary positions do not allow; mend it in this file")
    _refuse_window(fields, context)
    attention_bias = fields.flag("attention_bias", False) if model_type in ("llama", "qwen3") else False
    theta, scaling = _rope(fields)
    return ModelConfig(
        family="llama",
        layers=fields.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        context=context,
        norm_eps=fields.real("rms_norm_eps", 1e-6),
        activation=fields.activation("hidden_act", "silu"),
        tied=fields.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=model_type == "qwen3",
        qkv_bias=attention_bias or model_type == "qwen2",
        out_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) if model_type == "llama" else False,
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def _refuse_window(fields: _Fields, context: int) -> None:
    """A window at least as wide as the context hides nothing; a narrower one would need its own attention."""
    window = fields.members.get("sliding_window")
    used = fields.members["model_type"] == "mistral" or fields.flag("use_sliding_window", False)
    if window is not None and used and fields.integer("sliding_window") < context:
        raise fields.fail(
            f"sliding_window {window} is narrower than the context {context}, which is not supported; "
            f"set max_position_embeddings to {window} in this file, which changes no result within the window"
        )


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 5 keeps both in rope_parameters, 4 in rope_theta and rope_scaling."""
    name = "rope_parameters" if fields.members.get("rope_parameters") is not None else "rope_scaling"
    members = fields.members.get(name)
    if members is not None and not isinstance(members, dict):
        raise fields.fail(f"{name} is {members!r} where an object is needed; mend it in this file")
    rope = _Fields(fields.path, members or {})
    theta = rope.real("rope_theta", fields.real("rope_theta", 10000.0))
    if rope.real("partial_rotary_factor", fields.real("partial_rotary_factor", 1.0)) != 1.0:
        raise fields.fail("partial_rotary_factor is not supported; use a model without it")
    kind = rope.members.get("rope_type", rope.members.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.real("factor", 1.0))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            rope.real("factor", 8.0),
            rope.real("low_freq_factor", 1.0),
            rope.real("high_freq_factor", 4.0),
            rope.integer("original_max_position_embeddings", 8192),
        )
    raise fields.fail(f"{name} {kind!r} is not supported; use a model with default, linear or llama3 rotary positions")
