"""The parts of one decoder layer as plain callables over tensors; knows no checkpoint and no parallelism."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .kv import KVCache
from .step import Group, Step

Map = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Map] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(slots=True)
class Linear:
    """x [n, in] -> [n, out]; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class LayerNorm:
    """Ba et al. 2016, over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class RMSNorm:
    """Zhang and Sennrich 2019, over the last dimension."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(slots=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up being one matrix."""

    gate_up: Linear
    down: Linear
    activation: Map

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(slots=True)
class MLP:
    """down(act(up(x)))."""

    up: Linear
    down: Linear
    activation: Map

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@dataclass(slots=True)
class HeadNorm:
    """RMSNorm of each query and key head on its own; `weight` [heads + kv_heads, head_dim]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(slots=True)
class Attention:
    """Causal attention over cached and new tokens; query heads share kv heads (Ainslie et al. 2023)."""

    qkv: Linear  # queries, keys, values in this order
    out: Linear
    heads: int
    kv_heads: int
    head_dim: int
    head_norm: HeadNorm | None

    def __call__(self, x: Tensor, step: Step, cache: KVCache, layer: int) -> Tensor:
        n = x.shape[0]
        qkv = self.qkv(x).view(n, self.heads + 2 * self.kv_heads, self.head_dim)
        qk = qkv[:, : self.heads + self.kv_heads]
        if self.head_norm is not None:
            qk.copy_(self.head_norm(qk))
        if step.cos is not None and step.sin is not None:
            swapped = qk.roll(self.head_dim // 2, -1)
            qk.mul_(step.cos).addcmul_(swapped, step.sin)
        cache.write(layer, step.slots, qkv[:, self.heads :])
        queries = qkv[:, : self.heads]
        if len(step.groups) == 1:
            return self.out(self._attend(queries, step.groups[0], cache, layer))
        mixed = torch.empty(n, self.heads * self.head_dim, dtype=x.dtype, device=x.device)
        for group in step.groups:
            mixed[group.tokens] = self._attend(queries[group.tokens], group, cache, layer)
        return self.out(mixed)

    def _attend(self, queries: Tensor, group: Group, cache: KVCache, layer: int) -> Tensor:
        """[batch * c, heads, head_dim] -> [batch * c, heads * head_dim]. The query heads of one kv head become rows
        of one query matrix, so that keys and values are never repeated."""
        keys, values = cache.read(layer, group.table, group.batch)
        shape = (group.batch, -1, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        queries = queries.view(shape).permute(0, 2, 3, 1, 4)
        c = queries.shape[3]
        queries = queries.reshape(group.batch, self.kv_heads, -1, self.head_dim)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, group.mask)
        mixed = mixed.view(group.batch, self.kv_heads, -1, c, self.head_dim).permute(0, 3, 1, 2, 4)
        return mixed.reshape(group.batch * c, self.heads * self.head_dim)


@dataclass(slots=True)
class Block:
    """One pre-norm decoder layer."""

    attention_norm: Map
    attention: Attention
    mlp_norm: Map
    mlp: Map

    def __call__(self, x: Tensor, step: Step, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        """x [n, hidden] -> what leaves the layer and what entered its MLP, both [n, hidden]."""
        x = self.attention(self.attention_norm(x), step, cache, layer).add_(x)
        ffn_input = self.mlp_norm(x)
        return self.mlp(ffn_input).add_(x), ffn_input
