"""The encoder of a T5 as plain torch: token ids of chunks to a state for each token. Knows no tokenizer, no decoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from .blocks import Map
from .checkpoint import Checkpoint
from .config import read_config
from .errors import CheckpointError
from .linear import Linear
from .model import ModelConfig
from .names import NAMES
from .t5 import MODEL_TYPES, T5Config
from .t5_parts import T5Loader, buckets_of


@dataclass(slots=True)
class EncoderLayer:
    """Self-attention that sees the whole chunk, and an MLP, each behind its norm."""

    attention_norm: Map
    qkv: Linear
    out: Linear
    mlp_norm: Map
    mlp: Map
    heads: int

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [chunks, tokens, hidden]; mask [chunks, heads, tokens, tokens] is added to scores."""
        chunks, tokens, hidden = x.shape
        flat = x.reshape(-1, hidden)
        split = self.qkv(self.attention_norm(flat)).view(chunks, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask, scale=1.0)
        flat = self.out(seen.transpose(1, 2).reshape(chunks * tokens, -1)).add_(flat)
        return self.mlp(self.mlp_norm(flat)).add_(flat).view(chunks, tokens, hidden)


class _Loader(T5Loader):
    """Reads the encoder's parts by the names that the decoder's have, but for where its MLP is."""

    side = "encoder"

    def layers(self) -> list[EncoderLayer]:
        config = self.config
        names = NAMES[config.family]
        self.names = replace(names, final_norm="encoder.final_layer_norm")
        inner = config.heads * config.head_dim
        made: list[EncoderLayer] = []
        for layer in range(config.encoder_layers):
            at = f"encoder.block.{layer}."
            up, down = ([part.replace("layer.2", "layer.1") for part in parts] for parts in (names.up, [names.down]))
            made.append(
                EncoderLayer(
                    attention_norm=self._norm(f"{at}layer.0.layer_norm"),
                    qkv=self._linear([at + name for name in names.qkv], config.hidden, (inner,) * 3, False),
                    out=self._linear([at + names.out], inner, (config.hidden,), False),
                    mlp_norm=self._norm(f"{at}layer.1.layer_norm"),
                    mlp=self._mlp(at, up, down[0], config.intermediate),
                    heads=config.heads,
                )
            )
        return made


class T5Encoder:
    """The weights of an encoder in fp32, ready to compute."""

    def __init__(self, path: Path) -> None:
        """Reads the encoder's tensors, and no others.

        Raises:
            CheckpointError: the directory is broken, or that of another model.
        """
        self.config = t5_of(read_config(path), path)
        loader = _Loader(Checkpoint(path), self.config, torch.float32, torch.device("cpu"))
        self._embedding = loader.embedding()
        self._bias = loader.bias()
        self._layers = loader.layers()
        self._norm = loader.final_norm()

    @torch.inference_mode()
    def __call__(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """States of all chunks' tokens, joined, float32 [sum of lengths, hidden]; no chunk sees another.

        Raises:
            ValueError: no chunk, an empty one, or an id outside the vocabulary.
        """
        if not chunks or not all(chunks):
            raise ValueError("each chunk must have at least one token")
        longest = max(map(len, chunks))
        ids = torch.zeros(len(chunks), longest, dtype=torch.int64)
        for row, given in zip(ids, chunks, strict=True):
            row[: len(given)] = torch.tensor(given)
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab:
            raise ValueError(f"token ids must be 0 to {self.config.vocab - 1}: is the tokenizer the model's own?")
        places = torch.arange(longest)
        there = places < torch.tensor([len(given) for given in chunks])[:, None]
        bias = self._bias[buckets_of(self.config, places[:, None] - places, both=True)].permute(2, 0, 1)
        mask = bias[None].masked_fill(~there[:, None, None, :], float("-inf"))
        x = self._embedding(ids)
        for layer in self._layers:
            x = layer(x, mask)
        return self._norm(x[there])


def t5_of(config: ModelConfig, path: Path) -> T5Config:
    """The config of an encoder-decoder; CheckpointError for any other model."""
    if not isinstance(config, T5Config):
        kinds = " or ".join(MODEL_TYPES)
        raise CheckpointError(f"{path}: is a decoder-only model, it has no encoder; use one of model_type {kinds}")
    return config
