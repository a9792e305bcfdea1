"""The parts of one decoder layer as plain callables over tensors; knows no checkpoint and no parallelism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .kv import KVCache
from .linear import Linear
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
class LayerNorm:
    """Ba et al. 2016, over the last dimension."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class RMSNorm:
    """Zhang and Sennrich 2019, over the last dimension, summed in fp32; `weight` may be fp32 whatever x is."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


@dataclass(slots=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)), gate and up being one matrix."""

    gate_up: Linear
    down: Map
    activation: Map

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up))


@dataclass(slots=True)
class MLP:
    """down(act(up(x)))."""

    up: Linear
    down: Map
    activation: Map

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@dataclass(slots=True)
class Experts:
    """Each token's weighted sum of its `active` best of several MLPs (Shazeer et al. 2017); `router` [MLPs, hidden]."""

    router: Tensor
    experts: Sequence[Map]
    active: int
    renormalize: bool
    fixed: bool = False  # each of them gets as many rows as come in, so that its product has one shape

    def __call__(self, x: Tensor) -> Tensor:
        chances = functional.linear(x, self.router).float().softmax(-1)
        weights, chosen = chances.topk(self.active, -1)  # [n, active]
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        mixed = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            given = x[tokens]
            if self.fixed:
                given = functional.pad(given, (0, 0, 0, len(x) - len(tokens)))
            made = self.experts[number](given)[: len(tokens)]
            mixed.index_add_(0, tokens, made * weights[tokens, place, None])
        return mixed


@dataclass(slots=True)
class HeadNorm:
    """RMSNorm of each query and key head on its own; `weight` [heads + kv_heads, head_dim]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.to(self.weight.dtype), self.weight.shape[-1:], None, self.eps).mul_(self.weight)


@dataclass(slots=True)
class Attention:
    """Causal attention over cached and new tokens; query heads share kv heads (Ainslie et al. 2023)."""

    qkv: Linear  # queries, keys, values in this order
    out: Map
    heads: int
    kv_heads: int
    head_dim: int
    head_norm: HeadNorm | None
    window: int  # how many tokens a token sees, itself included; 0 for all
    rope: int  # which of the step's rotary factors
    scale: float | None  # of scores; None: 1 / sqrt(head_dim)
    cap: float | None  # scores s become cap * tanh(s / cap)

    def __call__(self, x: Tensor, step: Step, cache: KVCache, layer: int) -> Tensor:
        n = x.shape[0]
        qkv = self.qkv(x).view(n, self.heads + 2 * self.kv_heads, self.head_dim)
        qk = qkv[:, : self.heads + self.kv_heads]
        if self.head_norm is not None:
            qk.copy_(self.head_norm(qk))
        if step.ropes:
            cos, sin = step.ropes[self.rope]
            turned = qk[..., : cos.shape[-1]]
            swapped = turned.roll(cos.shape[-1] // 2, -1)
            turned.mul_(cos).addcmul_(swapped, sin)
        cache.write(layer, step.slots, qkv[: len(step.slots), self.heads :])
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
        view = group.views[self.window]
        keys, values = cache.read(layer, view.table, group.batch, view.seen)
        c = len(queries) // group.batch
        if c > 1:
            shape = (group.batch, c, self.kv_heads, -1, self.head_dim)
            queries = queries.view(shape).permute(0, 2, 3, 1, 4)
        queries = queries.reshape(group.batch, self.kv_heads, -1, self.head_dim)
        if self.cap is None:
            mixed = functional.scaled_dot_product_attention(queries, keys, values, view.mask, scale=self.scale)
        else:
            mixed = _capped(queries, keys, values, view.mask, self.scale or self.head_dim**-0.5, self.cap)
        if c > 1:
            mixed = mixed.view(group.batch, self.kv_heads, -1, c, self.head_dim).permute(0, 3, 1, 2, 4)
        return mixed.reshape(group.batch * c, self.heads * self.head_dim)


def _capped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Attention with scores bounded by `cap` (Gemma 2), which torch's own kernel does not know."""
    scores = (queries @ keys.transpose(-1, -2)).mul_(scale / cap).tanh_().mul_(cap)
    if mask is not None:
        scores.add_(mask)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


@dataclass(slots=True)
class Block:
    """One pre-norm decoder layer; the post norms, where there are any, are of what is added to the residual."""

    attention_norm: Map
    attention: Attention
    attention_post: Map | None
    mlp_norm: Map
    mlp: Map
    mlp_post: Map | None

    def __call__(self, x: Tensor, step: Step, cache: KVCache, layer: int) -> tuple[Tensor, Tensor]:
        """x [n, hidden] -> what leaves the layer and what entered its MLP, both [n, hidden]."""
        added = self.attention(self.attention_norm(x), step, cache, layer)
        x = (added if self.attention_post is None else self.attention_post(added)).add_(x)
        ffn_input = self.mlp_norm(x)
        added = self.mlp(ffn_input)
        return (added if self.mlp_post is None else self.mlp_post(added)).add_(x), ffn_input
