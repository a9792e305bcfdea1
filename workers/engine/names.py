"""Which tensor of a checkpoint is which part of a model, as data per family; reads none. Knows no torch."""

from dataclasses import dataclass, replace

from .headers import Headers


@dataclass(frozen=True, slots=True)
class Names:
    """Names within a checkpoint. Several names for one part are stacked along the output dimension, in this order."""

    prefixes: tuple[str, ...]  # the first under which the embedding is found; the head has none
    embedding: str
    positions: str | None
    final_norm: str
    layer: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    mlp_norm: str
    up: tuple[str, ...]  # with `gated` also the gate, first
    down: str
    gated: bool
    transposed: bool = False  # weights are stored [in, out]
    attention_post: str = ""  # norms of what attention and MLP add, where ModelConfig.post_norms
    mlp_post: str = ""
    router: str = ""
    expert: str = ""  # an expert's prefix; its matrices are called as follows
    expert_up: tuple[str, ...] = ()
    expert_down: str = ""
    everywhere: tuple[str, ...] = ()  # tensors that every span needs


HEAD = "lm_head.weight"
_T5 = Names(
    prefixes=("",),
    embedding="shared.weight",
    positions=None,
    final_norm="decoder.final_layer_norm",
    layer="decoder.block.{}.",
    attention_norm="layer.0.layer_norm",
    qkv=("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    out="layer.0.SelfAttention.o",
    mlp_norm="layer.2.layer_norm",
    up=("layer.2.DenseReluDense.wi",),
    down="layer.2.DenseReluDense.wo",
    gated=False,
    everywhere=("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
)
_LLAMA = Names(
    prefixes=("model.", ""),
    embedding="embed_tokens.weight",
    positions=None,
    final_norm="norm",
    layer="layers.{}.",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    gated=True,
)
NAMES = {
    "gpt2": Names(
        prefixes=("transformer.", ""),
        embedding="wte.weight",
        positions="wpe.weight",
        final_norm="ln_f",
        layer="h.{}.",
        attention_norm="ln_1",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        mlp_norm="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        gated=False,
        transposed=True,
    ),
    "opt": Names(
        prefixes=("model.decoder.", "decoder."),
        embedding="embed_tokens.weight",
        positions="embed_positions.weight",
        final_norm="final_layer_norm",
        layer="layers.{}.",
        attention_norm="self_attn_layer_norm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up=("fc1",),
        down="fc2",
        gated=False,
    ),
    "llama": _LLAMA,
    "phi3": replace(_LLAMA, qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    "gemma": replace(
        _LLAMA,
        attention_post="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post="post_feedforward_layernorm",
    ),
    "mixtral": replace(
        _LLAMA,
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}.",
        expert_up=("w1", "w3"),
        expert_down="w2",
    ),
    "qwen3_moe": replace(
        _LLAMA,
        router="mlp.gate",
        expert="mlp.experts.{}.",
        expert_up=("gate_proj", "up_proj"),
        expert_down="down_proj",
    ),
    "t5": _T5,
    "t5_gated": replace(_T5, up=("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"), gated=True),
}


def prefix_of(checkpoint: Headers, names: Names) -> str:
    """What all names but the head's begin with in this checkpoint, of which only some layers may be there."""
    stem = names.layer.partition("{")[0]
    there = checkpoint.names()
    found = (
        p for p in names.prefixes if p + names.embedding in checkpoint or any(n.startswith(p + stem) for n in there)
    )
    return next(found, names.prefixes[0])
