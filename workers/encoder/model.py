"""Encoders of the BERT family as plain torch: token ids to one vector a text. Knows no tokenizer and no message."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.blocks import ACTIVATIONS, LayerNorm, Map
from ..engine.checkpoint import Checkpoint
from ..engine.fields import Fields, read_json
from ..engine.t5 import MODEL_TYPES as ENCODER_DECODERS

Pooling = Literal["mean", "cls"]
SHIFTED: Final = ("roberta", "xlm-roberta", "camembert")  # positions begin behind the padding token's id
MODEL_TYPES: Final = ("bert", *SHIFTED)
PREFIXES: Final = ("", "bert.", "roberta.")  # of names in a checkpoint that was saved with a head


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """One encoder: `first` is the number of the first token's position, `context` the tokens that a text may have."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    types: int
    first: int
    eps: float
    activation: str

    @property
    def context(self) -> int:
        return self.positions - self.first


@dataclass(slots=True)
class Affine:
    """x W^T + b, W being [out, in]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class Layer:
    """One layer of Devlin et al. 2019: norms behind the residuals. `qkv` is three matrices in one."""

    qkv: Affine
    out: Affine
    after_attention: LayerNorm
    up: Affine
    down: Affine
    after_mlp: LayerNorm
    heads: int
    activation: Map

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [texts, tokens, hidden]; mask [texts, 1, 1, tokens] is true where there is a token."""
        texts, tokens, hidden = x.shape
        split = self.qkv(x).view(texts, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask)
        x = self.after_attention(x + self.out(seen.transpose(1, 2).reshape(texts, tokens, hidden)))
        return self.after_mlp(x + self.down(self.activation(self.up(x))))


class Encoder:
    """The weights of an encoder in fp32, ready to compute."""

    def __init__(self, config: EncoderConfig, words: Tensor, positions: Tensor, norm: LayerNorm) -> None:
        self.config = config
        self.layers: list[Layer] = []
        self._words = words
        self._positions = positions  # those of texts, from the first token on, the type's vector added
        self._norm = norm

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Sequence[int]], pooling: Pooling, normalize: bool) -> Tensor:
        """Token ids of texts to float32 [texts, hidden].

        "mean" is over a text's own tokens, "cls" its first token's state (Reimers and Gurevych 2019).

        Raises:
            ValueError: no text, an empty one, one longer than the context, or an id outside the vocabulary.
        """
        longest = max(map(len, rows), default=0)
        if not longest or longest > self.config.context or not all(rows):
            raise ValueError(f"texts must have 1 to {self.config.context} tokens")
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, given in zip(ids, rows, strict=True):
            row[: len(given)] = torch.tensor(given)
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab:
            raise ValueError(f"token ids must be 0 to {self.config.vocab - 1}: is the tokenizer the model's own?")
        mask = torch.arange(longest) < torch.tensor([len(given) for given in rows])[:, None]
        x = self._norm(self._words[ids] + self._positions[:longest])
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        found = x[:, 0] if pooling == "cls" else (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return functional.normalize(found, dim=1) if normalize else found


def read_encoder(path: Path) -> EncoderConfig:
    """What config.json says of an encoder.

    Raises:
        CheckpointError: it is missing or broken, or describes a model that would be computed wrongly.
    """
    fields = Fields(path / "config.json", read_json(path / "config.json"))
    model_type = fields.members.get("model_type")
    if model_type in ENCODER_DECODERS:
        raise fields.fail(f"model_type {model_type!r} gives states, not vectors; start it as `ralmq worker t5-encoder`")
    if model_type not in MODEL_TYPES:
        raise fields.fail(f"model_type {model_type!r} is no encoder served here; use one of {', '.join(MODEL_TYPES)}")
    positions = fields.members.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise fields.fail(f"position_embedding_type {positions!r} is not computed; use a model with absolute positions")
    if fields.flag("is_decoder", False):
        raise fields.fail("is_decoder is true: the model sees only what is before a token; use an encoder")
    if fields.members.get("quantization_config") is not None:
        raise fields.fail("quantized checkpoints are not read; use the model in fp32, bf16 or fp16")
    padding = fields.token_ids("pad_token_id")
    first = (padding[0] if padding else 1) + 1 if model_type in SHIFTED else 0
    config = EncoderConfig(
        layers=fields.integer("num_hidden_layers"),
        hidden=fields.integer("hidden_size"),
        heads=fields.integer("num_attention_heads"),
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        positions=fields.integer("max_position_embeddings"),
        types=fields.integer("type_vocab_size", 2),
        first=first,
        eps=fields.real("layer_norm_eps", 1e-12),
        activation=fields.activation("hidden_act", "gelu"),
    )
    if config.hidden % config.heads:
        raise fields.fail(f"hidden_size {config.hidden} is no multiple of {config.heads} heads; mend it in this file")
    if config.context < 2:
        raise fields.fail(f"max_position_embeddings {config.positions} leaves no room for a text; mend it in this file")
    return config


def load_encoder(path: Path) -> Encoder:
    """The encoder of a Hugging Face directory: config.json and *.safetensors.

    Raises:
        CheckpointError: a file or a tensor is missing, or has another shape than config.json asks for.
    """
    config = read_encoder(path)
    tensors = _Tensors(Checkpoint(path))
    hidden, wide = config.hidden, config.intermediate
    words = tensors.get("embeddings.word_embeddings.weight", config.vocab, hidden)
    positions = tensors.get("embeddings.position_embeddings.weight", config.positions, hidden)
    types = tensors.get("embeddings.token_type_embeddings.weight", config.types, hidden)
    norm = tensors.norm("embeddings.LayerNorm", hidden, config.eps)
    encoder = Encoder(config, words, positions[config.first :] + types[0], norm)
    for number in range(config.layers):
        at = f"encoder.layer.{number}"
        parts = [tensors.affine(f"{at}.attention.self.{part}", hidden, hidden) for part in ("query", "key", "value")]
        encoder.layers.append(
            Layer(
                qkv=Affine(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
                out=tensors.affine(f"{at}.attention.output.dense", hidden, hidden),
                after_attention=tensors.norm(f"{at}.attention.output.LayerNorm", hidden, config.eps),
                up=tensors.affine(f"{at}.intermediate.dense", hidden, wide),
                down=tensors.affine(f"{at}.output.dense", wide, hidden),
                after_mlp=tensors.norm(f"{at}.output.LayerNorm", hidden, config.eps),
                heads=config.heads,
                activation=ACTIVATIONS[config.activation],
            )
        )
    return encoder


class _Tensors:
    """A checkpoint's tensors by their names in the encoder itself, in fp32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        known = [prefix for prefix in PREFIXES if f"{prefix}embeddings.word_embeddings.weight" in checkpoint]
        self._prefix = known[0] if known else ""

    def get(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.get(self._prefix + name, shape).float()

    def affine(self, name: str, inside: int, outside: int) -> Affine:
        return Affine(self.get(f"{name}.weight", outside, inside), self.get(f"{name}.bias", outside))

    def norm(self, name: str, hidden: int, eps: float) -> LayerNorm:
        old = f"{self._prefix}{name}.gamma" in self._checkpoint  # as the first BERT checkpoints call them
        weight, bias = ("gamma", "beta") if old else ("weight", "bias")
        return LayerNorm(self.get(f"{name}.{weight}", hidden), self.get(f"{name}.{bias}", hidden), eps)
