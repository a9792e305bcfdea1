"""One training run of the embedded checkpoint: model, learning rate, optimizer step, saved state.

Knows neither the corpus nor how long a run lasts. torch and transformers (extra `hf`) are imported when used.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import tokens

STATE_FILE = "state.safetensors"


class TrainingError(Exception):
    """A wrong option or state; the message says what to do next."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the weights, except how long the run lasts."""

    seed: int = 0
    vocabulary: int = 4096
    hidden: int = 256
    intermediate: int = 384
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    batch_rows: int = 4
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.1
    gradient_norm: float = 1.0


def learning_rate(step: int, settings: Settings, decay: tuple[int, int] | None) -> float:
    """Warm-up, then constant, then 1 - sqrt down to zero (Hägele et al. 2024): a stable state can always go on."""
    rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
    if decay is None or step < decay[0]:
        return rate
    return rate * (1.0 - math.sqrt(min(1.0, (step - decay[0] + 1) / (decay[1] + 1))))


def build_model(settings: Settings) -> Any:
    """A fresh transformers model in fp32, with dropout behind every attention and MLP."""
    import torch
    from torch.nn import functional
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)

    def drop(module: Any, inputs: Any, output: Any) -> Any:
        return functional.dropout(output, settings.dropout, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    return model


def loss_sum(model: Any, batch: Any) -> Any:
    """Summed negative log-likelihood, in nats, of rows [rows, length + 1] of ids."""
    from torch.nn import functional

    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")


def bits_per_byte(model: Any, texts: Sequence[Sequence[int]], text_bytes: int, context: int) -> float:
    """Bits per byte of text over rows of `context` tokens, the end-of-text tokens between texts counted as cost."""
    import torch

    model.train(False)
    with torch.no_grad():
        total = sum(float(loss_sum(model, torch.tensor([row]))) for row in tokens.rows(texts, context))
    model.train(True)
    return total / math.log(2) / text_bytes


@dataclass(slots=True)
class Run:
    """Weights, optimizer and position of one training run."""

    settings: Settings
    model: Any
    optimizer: Any
    step: int = 0
    seconds: float = 0.0
    decay: tuple[int, int] | None = None
    _epoch: tuple[int, list[list[int]]] | None = field(default=None, repr=False)

    @classmethod
    def start(cls, settings: Settings) -> Run:
        import torch

        model = build_model(settings)
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in model.parameters() if weight.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return cls(settings, model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True))

    @property
    def tokens(self) -> int:
        return self.step * self.settings.batch_rows * self.settings.context

    def batch(self, texts: Sequence[Sequence[int]]) -> Any:
        """The rows of this step: they follow from seed and step alone, so that a resumed run sees the same ones."""
        import torch

        size, seed = self.settings.batch_rows, self.settings.seed
        length = sum(map(len, texts))
        steps = (length - 1) // self.settings.context // size
        if steps == 0:
            raise TrainingError(f"{length} tokens are too few for one batch; lower batch_rows or context")
        epoch, at = divmod(self.step, steps)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, tokens.rows(texts, self.settings.context, random.Random(f"{seed}/{epoch}"))
        return torch.tensor(self._epoch[1][at * size : (at + 1) * size])

    def advance(self, texts: Sequence[Sequence[int]]) -> float:
        """One optimizer step; returns the mean loss in nats per token. Counts computing time, not waiting time."""
        import torch

        before = time.thread_time()
        torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings, self.decay)
        batch = self.batch(texts)
        loss = loss_sum(self.model, batch) / (batch.shape[0] * (batch.shape[1] - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.thread_time() - before
        return float(loss.detach())

    def save(self, directory: Path, corpus_sha256: str) -> None:
        """Weights, moments and position in one file, replaced in one move. Randomness follows from seed and step."""
        from safetensors.torch import save_file

        if self.step == 0:
            return  # the optimizer has no moments yet, and starting again gives the same weights
        tensors: dict[str, Any] = {}
        for name, weight in self.model.named_parameters():
            tensors[f"weight/{name}"] = weight.detach()
            for key, value in self.optimizer.state[weight].items():
                tensors[f"{key}/{name}"] = value
        about = {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "corpus_sha256": corpus_sha256,
        }
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / f"{STATE_FILE}.new", {"state": json.dumps(about)})
        os.replace(directory / f"{STATE_FILE}.new", directory / STATE_FILE)

    def load(self, directory: Path, corpus_sha256: str) -> None:
        """Goes on from a saved state. Raises TrainingError when there is none or it belongs to another run."""
        import torch
        from safetensors import safe_open

        path = directory / STATE_FILE
        if not path.is_file():
            raise TrainingError(f"no saved state at {path}; start without --resume")
        with safe_open(path, framework="pt") as file, torch.no_grad():
            about = json.loads(file.metadata()["state"])
            if about["settings"] != asdict(self.settings) or about["corpus_sha256"] != corpus_sha256:
                raise TrainingError(f"{path} was saved with other settings or texts; start without --resume")
            for name, weight in self.model.named_parameters():
                weight.copy_(file.get_tensor(f"weight/{name}"))
                self.optimizer.state[weight] = {
                    key: file.get_tensor(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step, self.seconds = about["step"], about["seconds"]
