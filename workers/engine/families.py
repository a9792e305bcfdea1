"""Which tensor of a checkpoint is which part of a layer, as data per family; builds layers, runs none."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .blocks import ACTIVATIONS, MLP, Attention, Block, GatedMLP, HeadNorm, LayerNorm, Linear, Map, RMSNorm
from .checkpoint import Checkpoint
from .config import ModelConfig


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
    up: tuple[str, ...]
    down: str
    transposed: bool  # weights are stored [in, out]


HEAD = "lm_head.weight"
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
        transposed=True,
    ),
    "llama": Names(
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
        transposed=False,
    ),
}


class Loader:
    """Reads the parts of one model in the wanted dtype and device, and counts what it read."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.dtype = dtype
        self.device = device
        self.names = NAMES[config.family]
        self.bytes = 0
        found = [p for p in self.names.prefixes if p + self.names.embedding in checkpoint]
        self.prefix = found[0] if found else self.names.prefixes[0]

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor of exactly this shape; CheckpointError where it is missing or shaped otherwise."""
        tensor = self.checkpoint.get(name, shape).to(device=self.device, dtype=self.dtype)
        self.bytes += tensor.nbytes
        return tensor

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]"""
        return self.tensor(self.prefix + self.names.embedding, self.config.vocab, self.config.hidden)

    def positions(self) -> torch.Tensor | None:
        """Learned positions [context, hidden], or None."""
        if self.names.positions is None:
            return None
        return self.tensor(self.prefix + self.names.positions, self.config.context, self.config.hidden)

    def head(self) -> torch.Tensor:
        """[vocab, hidden] of a head that is not tied."""
        return self.tensor(HEAD, self.config.vocab, self.config.hidden)

    def final_norm(self) -> Map:
        return self._norm(self.prefix + self.names.final_norm)

    def block(self, layer: int) -> Block:
        """Layer number `layer` of the whole model."""
        config, names = self.config, self.names
        at = self.prefix + names.layer.format(layer)
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        qkv_sizes = (query, key, key) if len(names.qkv) == 3 else (query + 2 * key,)
        attention = Attention(
            qkv=self._linear([at + name for name in names.qkv], config.hidden, qkv_sizes, config.qkv_bias),
            out=self._linear([at + names.out], query, (config.hidden,), config.out_bias),
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            head_norm=self._head_norm(at) if config.qk_norm else None,
        )
        up_sizes = (config.intermediate,) * len(names.up)
        up = self._linear([at + name for name in names.up], config.hidden, up_sizes, config.mlp_bias)
        down = self._linear([at + names.down], config.intermediate, (config.hidden,), config.mlp_bias)
        mlp = GatedMLP if len(names.up) == 2 else MLP
        return Block(
            attention_norm=self._norm(at + names.attention_norm),
            attention=attention,
            mlp_norm=self._norm(at + names.mlp_norm),
            mlp=mlp(up, down, ACTIVATIONS[config.activation]),
        )

    def _linear(self, names: Sequence[str], inputs: int, outputs: Sequence[int], bias: bool) -> Linear:
        stored = [(inputs, n) if self.names.transposed else (n, inputs) for n in outputs]
        weights = [self.tensor(f"{name}.weight", *shape) for name, shape in zip(names, stored, strict=True)]
        if self.names.transposed:
            weights = [weight.t().contiguous() for weight in weights]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if not bias:
            return Linear(weight, None)
        biases = [self.tensor(f"{name}.bias", n) for name, n in zip(names, outputs, strict=True)]
        return Linear(weight, torch.cat(biases))

    def _norm(self, name: str) -> Map:
        weight = self.tensor(f"{name}.weight", self.config.hidden)
        if self.config.family == "gpt2":
            return LayerNorm(weight, self.tensor(f"{name}.bias", self.config.hidden), self.config.norm_eps)
        return RMSNorm(weight, self.config.norm_eps)

    def _head_norm(self, at: str) -> HeadNorm:
        query = self.tensor(f"{at}self_attn.q_norm.weight", self.config.head_dim).expand(self.config.heads, -1)
        key = self.tensor(f"{at}self_attn.k_norm.weight", self.config.head_dim).expand(self.config.kv_heads, -1)
        return HeadNorm(torch.cat((query, key)), self.config.norm_eps)
