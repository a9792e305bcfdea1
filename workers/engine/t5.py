"""What an encoder-decoder of the T5 family is: sizes and switches beside those of a decoder. Knows no tensor."""

from dataclasses import dataclass

from .fields import Fields
from .model import ModelConfig

MODEL_TYPES = ("t5", "mt5")
CONTEXT = 8192  # relative positions know no bound: this one is of the slots that a text may have, encoder states first
ACTIVATIONS = {"gated-gelu": "gelu_new"}  # as transformers reads it; others are named as they are


@dataclass(frozen=True, slots=True)
class T5Config(ModelConfig):
    """T5 (Raffel et al. 2020): the decoder is what a ModelConfig says, with cross-attention in each layer.

    `buckets` and `farthest` are of relative positions, `head_scale` is what the head's input is multiplied by, `start`
    is the token before all others of the decoder.
    """

    encoder_layers: int = 0
    buckets: int = 32
    farthest: int = 128
    head_scale: float = 1.0
    start: int = 0

    @property
    def crossed(self) -> bool:
        return True


def read_t5(fields: Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> T5Config:
    """T5 and mT5, plain (v1.0) and gated (v1.1). The head's own matrix, where there is one, wins over a tied one."""
    hidden, heads = fields.integer("d_model", 512), fields.integer("num_heads", 8)
    layers = fields.integer("num_layers", 6)
    plain = fields.members["model_type"] == "t5"
    kind = fields.members.get("feed_forward_proj") or ("relu" if plain else "gated-gelu")
    if not isinstance(kind, str):
        raise fields.fail(f"feed_forward_proj is {kind!r} where a name is needed; mend it in this file")
    gated = kind.startswith("gated-")
    named = Fields(fields.path, {"feed_forward_proj": ACTIVATIONS.get(kind, kind.removeprefix("gated-"))})
    buckets, farthest = (
        fields.integer("relative_attention_num_buckets", 32),
        fields.integer("relative_attention_max_distance", 128),
    )
    if buckets < 4 or buckets % 4 or farthest <= buckets // 2:
        raise fields.fail(
            f"relative_attention_num_buckets {buckets} and relative_attention_max_distance {farthest} do not fit: "
            "give a multiple of 4, and more than half of it"
        )
    starts = fields.token_ids("decoder_start_token_id") or fields.token_ids("pad_token_id") or (0,)
    scaled = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True)) and plain
    return T5Config(
        family="t5_gated" if gated else "t5",
        layers=fields.integer("num_decoder_layers", layers),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=fields.integer("d_kv", 64),
        intermediate=fields.integer("d_ff", 2048),
        vocab=fields.integer("vocab_size", 32128),
        context=CONTEXT,
        norm_eps=fields.real("layer_norm_epsilon", 1e-6),
        activation=named.activation("feed_forward_proj", "relu"),
        tied=True,
        score_scale=1.0,
        eos_ids=eos_ids,
        bos_id=bos_id,
        encoder_layers=layers,
        buckets=buckets,
        farthest=farthest,
        head_scale=hidden**-0.5 if scaled else 1.0,
        start=starts[0],
    )
