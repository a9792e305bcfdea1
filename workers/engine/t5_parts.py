"""The parts of T5 that other models lack: biases of relative positions, cross-attention. Knows no message."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Attention, Block, Map
from .families import Loader
from .kv import KVCache
from .linear import Linear
from .step import Step
from .t5 import T5Config

CROSS = -1  # the view (see Group) of what cross-attention sees, where others are named by their window


def buckets_of(config: T5Config, distances: Tensor, both: bool) -> Tensor:
    """Numbers of the buckets of relative positions, of the same shape (Raffel et al. 2020, section 2.1).

    Half of them are of one distance each, the others grow in powers up to `farthest`.

    Args:
        distances: query's position less key's, in tokens.
        both: keys behind the query have buckets of their own, the second half; without it they count as distance 0.
    """
    count = config.buckets // 2 if both else config.buckets
    behind = count * (distances < 0) if both else torch.zeros_like(distances)
    distances = distances.abs() if both else distances.clamp(min=0)
    exact = count // 2
    # The same operations in the same order as where the weights were trained: floor decides at powers.
    grown = torch.log(distances.clamp(min=1).float() / exact) / math.log(config.farthest / exact) * (count - exact)
    wide = (exact + grown.long()).clamp(max=count - 1)
    return behind + torch.where(distances < exact, distances, wide)


@dataclass(slots=True)
class CrossAttention(Attention):
    """Attention of decoder tokens over the encoder's states, whose keys and values lie in the sequence's first slots.

    `qkv` gives queries alone; `kv` keys and values of states.
    """

    kv: Linear

    def remember(self, states: Tensor, slots: Tensor, cache: KVCache, layer: int) -> None:
        """Keys and values of states [n, hidden] go into slots [n]."""
        cache.write(layer, slots, self.kv(states).view(len(states), 2 * self.kv_heads, self.head_dim))

    def __call__(self, x: Tensor, step: Step, cache: KVCache, layer: int) -> Tensor:
        queries = self.qkv(x).view(x.shape[0], self.heads, self.head_dim)
        mixed = torch.empty(len(x), self.heads * self.head_dim, dtype=x.dtype, device=x.device)
        for group in step.groups:
            mixed[group.tokens] = self._attend(queries[group.tokens], group, cache, layer)
        return self.out(mixed)


@dataclass(slots=True)
class CrossBlock(Block):
    """A decoder layer with cross-attention between self-attention and MLP, behind a norm of its own."""

    cross_norm: Map
    cross: CrossAttention

    def __call__(self, x: Tensor, step: Step, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        """x [n, hidden] -> what leaves the layer and what entered its MLP, both [n, hidden]."""
        x = self.attention(self.attention_norm(x), step, cache, layer).add_(x)
        x = self.cross(self.cross_norm(x), step, cache, layer).add_(x)
        ffn_input = self.mlp_norm(x)
        return self.mlp(ffn_input).add_(x), ffn_input


class T5Loader(Loader):
    """Reads the decoder's parts."""

    config: T5Config
    side = "decoder"

    def bias(self) -> Tensor:
        """[buckets, heads], which the first layer holds for all."""
        name = f"{self.side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return self.tensor(name, self.config.buckets, self.config.heads)

    def block(self, layer: int) -> CrossBlock:
        config, at, plain = self.config, f"decoder.block.{layer}.layer.1.", super().block(layer)
        inner = config.heads * config.head_dim
        cross = CrossAttention(
            qkv=self._linear([f"{at}EncDecAttention.q"], config.hidden, (inner,), False),
            out=self._linear([f"{at}EncDecAttention.o"], inner, (config.hidden,), False),
            heads=config.heads,
            kv_heads=config.heads,
            head_dim=config.head_dim,
            head_norm=None,
            window=CROSS,
            rope=0,
            scale=config.score_scale,
            cap=None,
            kv=self._linear([f"{at}EncDecAttention.{part}" for part in "kv"], config.hidden, (inner, inner), False),
        )
        return CrossBlock(
            attention_norm=plain.attention_norm,
            attention=plain.attention,
            attention_post=None,
            mlp_norm=plain.mlp_norm,
            mlp=plain.mlp,
            mlp_post=None,
            cross_norm=self._norm(f"{at}layer_norm"),
            cross=cross,
        )
