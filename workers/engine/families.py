"""The layers of a family from the tensors of a checkpoint; builds them, runs none. Names are in names.py."""

from collections.abc import Sequence

import torch

from .blocks import ACTIVATIONS, MLP, Attention, Block, Experts, GatedMLP, HeadNorm, LayerNorm, Map, RMSNorm
from .checkpoint import Checkpoint
from .int8 import Int8
from .linear import Blocked, Linear, Plain, empty
from .model import ModelConfig
from .names import HEAD, NAMES, prefix_of


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

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: one that a checkpoint holds is used whatever the config says."""
        return self.config.tied and HEAD not in self.checkpoint

    def head(self) -> Linear:
        """[vocab, hidden]; of a tied model it is read from the embedding."""
        head = self._empty(self.config.vocab, self.config.hidden)
        name = self.prefix + self.names.embedding if self.tied else HEAD
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
