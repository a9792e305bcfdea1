"""Which tensor of a checkpoint is which part of a layer, as data per family; builds layers, runs none."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .blocks import ACTIVATIONS, MLP, Attention, Block, Experts, GatedMLP, HeadNorm, LayerNorm, Map, RMSNorm
from .checkpoint import Checkpoint
from .linear import Blocked, Int8, Linear, Plain, empty
from .model import ModelConfig


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


def prefix_of(checkpoint: Checkpoint, names: Names) -> str:
    """What all names but the head's begin with in this checkpoint, of which only some layers may be there."""
    stem = names.layer.partition("{")[0]
    there = checkpoint.names()
    found = (
        p for p in names.prefixes if p + names.embedding in checkpoint or any(n.startswith(p + stem) for n in there)
    )
    return next(found, names.prefixes[0])


class Loader:
    """Reads the parts of one model in the wanted dtype and device, and counts what it read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        int8: bool = False,
        packed: bool = False,
    ) -> None:
        """`int8` is of matrices alone, `dtype` of everything else; `packed` allows forms that suit this machine."""
        self.checkpoint = checkpoint
        self.config = config
        self.dtype = dtype
        self.device = device
        self.int8 = int8
        self.packed = packed
        self.names = NAMES[config.family]
        self.bytes = 0
        self.prefix = prefix_of(checkpoint, self.names)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor of exactly this shape; CheckpointError where it is missing or shaped otherwise."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        for start, rows in self.checkpoint.slabs(name, shape):
            tensor[start : start + len(rows)] = rows
        self.bytes += tensor.nbytes
        return tensor

    def embedding(self) -> Map:
        """Ids [n] -> rows [n, hidden] of the embedding, which is never quantized."""
        name = self.prefix + self.names.embedding
        return Plain(self.tensor(name, self.config.vocab, self.config.hidden)).rows

    def positions(self) -> torch.Tensor | None:
        """Learned positions [context, hidden], or None."""
        if self.names.positions is None:
            return None
        before = self.config.position_offset
        name = self.prefix + self.names.positions
        return self.tensor(name, before + self.config.context, self.config.hidden)[before:]

    def head(self) -> Linear:
        """[vocab, hidden]; of a tied model it is read from the embedding."""
        head = self._empty(self.config.vocab, self.config.hidden)
        name = self.prefix + self.names.embedding if self.config.tied else HEAD
        self._fill(head, name, self.config.vocab, self.config.hidden)
        return self._counted(head.finished())

    def tied_ends(self) -> tuple[Map, Linear]:
        """Embedding and head of a tied model in one span, which are one matrix in memory wherever its form allows."""
        head = self._empty(self.config.vocab, self.config.hidden)
        name = self.prefix + self.names.embedding
        if isinstance(head, Int8):
            table = self.tensor(name, self.config.vocab, self.config.hidden)
            head.fill(0, table)
            return Plain(table).rows, self._counted(head.finished())
        assert isinstance(head, Plain | Blocked)
        self._fill(head, name, self.config.vocab, self.config.hidden)
        return head.rows, self._counted(head.finished())

    def final_norm(self) -> Map:
        return self._norm(self.prefix + self.names.final_norm)

    def block(self, layer: int) -> Block:
        """Layer number `layer` of the whole model."""
        config, names = self.config, self.names
        at = self.prefix + names.layer.format(layer)
        sparse = config.experts is not None and layer in config.experts.layers
        return Block(
            attention_norm=self._norm(at + names.attention_norm),
            attention=self._attention(at, config.window(layer)),
            attention_post=self._norm(at + names.attention_post) if config.post_norms else None,
            mlp_norm=self._norm(at + names.mlp_norm),
            mlp=self._experts(at) if sparse else self._mlp(at, names.up, names.down, config.intermediate),
            mlp_post=self._norm(at + names.mlp_post) if config.post_norms else None,
        )

    def _attention(self, at: str, window: int) -> Attention:
        config, names = self.config, self.names
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        sizes = (query, key, key) if len(names.qkv) == 3 else (query + 2 * key,)
        return Attention(
            qkv=self._linear([at + name for name in names.qkv], config.hidden, sizes, config.qkv_bias),
            out=self._linear([at + names.out], query, (config.hidden,), config.out_bias),
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            head_norm=self._head_norm(at) if config.qk_norm else None,
            window=window,
            rope=1 if window and len(config.ropes) == 2 else 0,
            scale=config.score_scale,
            cap=config.score_cap,
        )

    def _mlp(self, at: str, up: Sequence[str], down: str, intermediate: int) -> Map:
        config, gated = self.config, self.names.gated
        sizes = (intermediate,) * len(up) if len(up) == 2 or not gated else (2 * intermediate,)
        inside = self._linear([at + name for name in up], config.hidden, sizes, config.mlp_bias)
        outside = self._linear([at + down], intermediate, (config.hidden,), config.mlp_bias)
        return (GatedMLP if gated else MLP)(inside, outside, ACTIVATIONS[config.activation])

    def _experts(self, at: str) -> Map:
        config, names = self.config, self.names
        assert config.experts is not None
        count, intermediate = config.experts.count, config.experts.intermediate
        return Experts(
            router=self.tensor(f"{at}{names.router}.weight", count, config.hidden),
            experts=[
                self._mlp(at + names.expert.format(number), names.expert_up, names.expert_down, intermediate)
                for number in range(count)
            ],
            active=config.experts.active,
            renormalize=config.experts.renormalize,
        )

    def _linear(self, names: Sequence[str], inputs: int, outputs: Sequence[int], bias: bool) -> Linear:
        made = self._empty(sum(outputs), inputs)
        start = 0
        for name, n in zip(names, outputs, strict=True):
            if not self.names.transposed:
                self._fill(made, f"{name}.weight", n, inputs, start)
            else:
                whole = isinstance(made, Int8)  # its scales are of whole columns of what is stored
                for first, columns in self.checkpoint.slabs(f"{name}.weight", (inputs, n), whole=whole):
                    made.fill(start, columns.t(), first)
            start += n
        if bias:
            made.bias = torch.cat([self.tensor(f"{name}.bias", n) for name, n in zip(names, outputs, strict=True)])
        return self._counted(made.finished())

    def _empty(self, outputs: int, inputs: int) -> Linear:
        return empty(outputs, inputs, self.dtype, self.device, int8=self.int8, packed=self.packed)

    def _fill(self, made: Linear, name: str, outputs: int, inputs: int, start: int = 0) -> None:
        for first, rows in self.checkpoint.slabs(name, (outputs, inputs)):
            made.fill(start + first, rows)

    def _counted(self, made: Linear) -> Linear:
        self.bytes += made.nbytes
        return made

    def _norm(self, name: str) -> Map:
        if self.config.rms_norm:
            return RMSNorm(self._gain(f"{name}.weight", self.config.hidden), self.config.norm_eps)
        weight = self.tensor(f"{name}.weight", self.config.hidden)
        bias = self.tensor(f"{name}.bias", self.config.hidden) if self.config.norm_bias else None
        return LayerNorm(weight, bias, self.config.norm_eps)

    def _head_norm(self, at: str) -> HeadNorm:
        query = self._gain(f"{at}self_attn.q_norm.weight", self.config.head_dim).expand(self.config.heads, -1)
        key = self._gain(f"{at}self_attn.k_norm.weight", self.config.head_dim).expand(self.config.kv_heads, -1)
        return HeadNorm(torch.cat((query, key)), self.config.norm_eps)

    def _gain(self, name: str, n: int) -> torch.Tensor:
        """What an RMSNorm multiplies by; Gemma stores it less 1, and multiplies in fp32."""
        weight = self.tensor(name, n)
        return 1.0 + weight.float() if self.config.norm_offset else weight
