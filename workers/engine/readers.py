"""How each model_type spells its ModelConfig in config.json; knows no tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .fields import Fields
from .model import Experts, ModelConfig
from .rope import read_ropes
from .t5 import MODEL_TYPES, read_t5

Reader = Callable[[Fields, tuple[int, ...], int | None], ModelConfig]


class Beyond(Exception):
    """A variant of a family that our own blocks leave to the adapter."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model_type with RMSNorm and rotary positions fixes itself or leaves to config.json."""

    family: str
    bias: bool = False  # config.json may ask for biases of the attention's projections
    mlp_bias: bool = False  # ... and of the MLP's
    qkv_bias: bool = False  # queries, keys and values always have biases
    qk_norm: bool = False
    windowed: str = ""  # "all" layers, by "switch" (use_sliding_window) all, or "some" layers
    window: int | None = None  # where config.json names none
    every: int = 0  # each so manieth layer has no window
    head_dim: int | None = None  # where config.json names none
    theta: float = 10000.0
    eps: float = 1e-6
    activation: str = "silu"
    gemma: bool = False


_GEMMA = Kind(
    "gemma",
    bias=True,
    windowed="some",
    window=4096,
    every=2,
    head_dim=256,
    activation="gelu_pytorch_tanh",
    gemma=True,
)
KINDS = {
    "llama": Kind("llama", bias=True, mlp_bias=True),
    "mistral": Kind("llama", windowed="all", window=4096),
    "qwen2": Kind("llama", qkv_bias=True, windowed="some", window=4096),
    "qwen3": Kind("llama", bias=True, qk_norm=True, windowed="some", window=4096, head_dim=128),
    "qwen3_moe": Kind("qwen3_moe", bias=True, qk_norm=True, windowed="switch", window=4096),
    "mixtral": Kind("mixtral", windowed="all", theta=1e6, eps=1e-5),
    "phi3": Kind("phi3", windowed="all", eps=1e-5),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, qk_norm=True, every=6, theta=1e6),
}


def _gpt2(fields: Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> ModelConfig:
    for name, needed in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if fields.flag(name, needed) is not needed:
            raise fields.fail(f"{name} = {not needed} is not supported; use a model without it")
    hidden = fields.integer("n_embd")
    heads = fields.integer("n_head")
    bias = fields.flag("bias", True)  # nanoGPT's own switch
    return ModelConfig(
        family="gpt2",
        layers=fields.integer("n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_share(fields, "n_embd", hidden, "n_head", heads),
        intermediate=fields.integer("n_inner", 4 * hidden),
        vocab=fields.integer("vocab_size"),
        context=fields.integer("n_positions", 1024),
        norm_eps=fields.real("layer_norm_epsilon", 1e-5),
        activation=fields.activation("activation_function", "gelu_new"),
        tied=fields.flag("tie_word_embeddings", True),
        rms_norm=False,
        norm_bias=bias,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def _opt(fields: Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> ModelConfig:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    for name, usual in (
        ("do_layer_norm_before", True),
        ("_remove_final_layer_norm", False),
        ("layer_norm_elementwise_affine", True),
    ):
        if fields.flag(name, usual) is not usual:
            raise Beyond("other norms")
    if fields.integer("word_embed_proj_dim", hidden) != hidden:
        raise Beyond("projected embeddings")
    bias = fields.flag("enable_bias", True)
    return ModelConfig(
        family="opt",
        layers=fields.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=_share(fields, "hidden_size", hidden, "num_attention_heads", heads),
        intermediate=fields.integer("ffn_dim"),
        vocab=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings", 2048),
        norm_eps=1e-5,
        activation=fields.activation("activation_function", "relu"),
        tied=fields.flag("tie_word_embeddings", True),
        rms_norm=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        position_offset=2,
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def _share(fields: Fields, whole: str, size: int, part: str, count: int) -> int:
    if size % count:
        raise fields.fail(f"{whole} {size} is no multiple of {part} {count}; mend one of them in this file")
    return size // count


def _rotary(fields: Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> ModelConfig:
    kind = KINDS[fields.members["model_type"]]
    layers = fields.integer("num_hidden_layers")
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    _share(fields, "num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = fields.integer("head_dim", kind.head_dim or hidden // heads)
    if head_dim % 2:
        raise fields.fail(f"head_dim {head_dim} is odd, which rotary positions do not allow; mend it in this file")
    context = fields.integer("max_position_embeddings", 2048)
    ropes = read_ropes(fields, head_dim, context, kind.theta, local=kind.gemma and kind.qk_norm)
    if ropes[0].kind == "longrope":
        context = min(context, ropes[0].original_context)
    if fields.members.get("use_bidirectional_attention"):
        raise fields.fail("use_bidirectional_attention makes no generating model; use one without it")
    bias = kind.bias and fields.flag("attention_bias", False)
    caps = kind.gemma and not kind.qk_norm  # Gemma 2
    return ModelConfig(
        family=kind.family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        context=context,
        norm_eps=fields.real("rms_norm_eps", kind.eps),
        activation=fields.activation("hidden_activation" if kind.gemma else "hidden_act", kind.activation),
        tied=fields.flag("tie_word_embeddings", kind.gemma),
        ropes=ropes,
        windows=_windows(fields, kind, layers, context),
        norm_offset=kind.gemma,
        post_norms=kind.gemma,
        qk_norm=kind.qk_norm,
        qkv_bias=bias or kind.qkv_bias,
        out_bias=bias,
        mlp_bias=kind.mlp_bias and fields.flag("mlp_bias", False),
        experts=_experts(fields, layers),
        embedding_scale=hidden**0.5 if kind.gemma else 1.0,
        score_scale=fields.real("query_pre_attn_scalar", 256) ** -0.5 if kind.gemma else None,
        score_cap=fields.optional("attn_logit_softcapping", 50.0) if caps else None,
        logit_cap=fields.optional("final_logit_softcapping", 30.0 if caps else None) if kind.gemma else None,
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def _windows(fields: Fields, kind: Kind, layers: int, context: int) -> tuple[int, ...]:
    """A window at least as wide as the context hides nothing and counts as none."""
    used = kind.windowed == "all" or kind.gemma or fields.flag("use_sliding_window", False)
    if not kind.windowed or not used or fields.optional("sliding_window", kind.window) is None:
        return ()
    window = fields.integer("sliding_window", kind.window)
    if window >= context:
        return ()
    if kind.windowed != "some":
        return (window,) * layers
    types = fields.members.get("layer_types")
    if types is None and kind.every:
        every = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", kind.every))
        wide = [(layer + 1) % every == 0 for layer in range(layers)]
    elif types is None:
        # Zero is a sound value here, unlike anywhere else.
        first = 0 if fields.members.get("max_window_layers") == 0 else fields.integer("max_window_layers", 28)
        wide = [layer < first for layer in range(layers)]
    else:
        known = {"full_attention": True, "sliding_attention": False}
        if not isinstance(types, list) or len(types) != layers or not all(name in known for name in types):
            raise fields.fail(
                f"layer_types is {types!r} where full_attention or sliding_attention is needed for each of {layers} "
                "layers; mend it in this file"
            )
        wide = [known[name] for name in types]
    return tuple(0 if all_seen else window for all_seen in wide) if not all(wide) else ()


def _experts(fields: Fields, layers: int) -> Experts | None:
    """Mixtral has experts in every layer; Qwen3-MoE may keep one MLP in some."""
    model_type = fields.members["model_type"]
    if model_type not in ("mixtral", "qwen3_moe"):
        return None
    mixtral = model_type == "mixtral"
    count = fields.integer("num_local_experts", fields.integer("num_experts", 8 if mixtral else 128))
    active = fields.integer("num_experts_per_tok", 2 if mixtral else 8)
    if active > count:
        raise fields.fail(f"num_experts_per_tok {active} is more than the {count} experts; mend one of them here")
    dense = () if mixtral else fields.token_ids("mlp_only_layers")
    step = 1 if mixtral else fields.integer("decoder_sparse_step", 1)
    return Experts(
        count,
        active,
        fields.integer("intermediate_size" if mixtral else "moe_intermediate_size"),
        mixtral or fields.flag("norm_topk_prob", False),
        tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0),
    )


READERS: dict[str, Reader] = {
    "gpt2": _gpt2,
    "opt": _opt,
    **dict.fromkeys(KINDS, _rotary),
    **dict.fromkeys(MODEL_TYPES, read_t5),
}
