"""Tiny random checkpoints of every family, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HIDDEN, VOCAB, CONTEXT = 64, 128, 256
FAMILIES = (
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "qwen3_moe",
)
# What a family's config needs besides the sizes that all have. Windows are narrower than the tests' sequences.
_SHAPES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 12, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}


def tiny_model(family: str, layers: int = 4, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model of a family; `changes` go to its transformers config (tie_word_embeddings=True ...).

    `layer_types` is repeated over all layers.
    """
    if family == "gpt2":
        shape: dict[str, Any] = {"n_layer": layers, "n_embd": HIDDEN, "n_head": 4, "n_positions": CONTEXT}
    else:
        shape = {
            "num_hidden_layers": layers,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
        }
    shape |= {**_SHAPES.get(family, {}), **changes}
    if shape.get("layer_types"):
        shape["layer_types"] = (shape["layer_types"] * layers)[:layers]
    special = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**special, "vocab_size": VOCAB, **shape})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh weights are small, zero or one: logits nearly equal, and a forgotten bias or norm would not show.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(4.0)
    return model


def tiny(family: str, path: Path, layers: int = 4, *, shard: str | None = None, **changes: Any) -> Path:
    """Writes such a model into `path` and returns it; `shard` ("40KB") splits it over several files."""
    tiny_model(family, layers, **changes).save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return path
