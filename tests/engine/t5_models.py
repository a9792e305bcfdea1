"""Tiny random T5 checkpoints as transformers writes them, and what transformers makes of chunks and ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

VOCAB = 128
KINDS: dict[str, dict[str, Any]] = {
    "v1.0": {"feed_forward_proj": "relu"},  # one matrix for both embeddings and the head, whose input is scaled
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
SHAPE = {
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_layers": 2,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 30,  # nearer than the tests' texts are long
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}


def t5_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model; `changes` go to its transformers config."""
    family = "mt5" if kind == "mt5" else "t5"
    config = AutoConfig.for_model(family, **{"vocab_size": VOCAB, **SHAPE, **KINDS[kind], **changes})
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
    if kind != "v1.0":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, 48))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # fresh norms are one: a forgotten one would not show
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name == "shared.weight":
                parameter.mul_(0.1)  # else the head of a tied one says the last token again
            elif name.endswith(("q.weight", "k.weight", "EncDecAttention.v.weight")) or "bias" in name:
                parameter.mul_(4.0)  # what is seen, and from how far, shall matter
    return model


def t5(kind: str, path: Path, **changes: Any) -> Path:
    """Writes such a model into `path` and returns it."""
    t5_model(kind, **changes).save_pretrained(path)
    return path


@torch.no_grad()
def states_of(model: PreTrainedModel, chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """transformers' encoder on each chunk alone, joined, [n, hidden]."""
    encoder = model.get_encoder()
    return torch.cat([encoder(torch.tensor([list(chunk)])).last_hidden_state[0] for chunk in chunks])


@torch.no_grad()
def logits_of(model: PreTrainedModel, states: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits [n, vocab] of the decoder's ids."""
    given = BaseModelOutput(last_hidden_state=states[None])
    return model(encoder_outputs=given, decoder_input_ids=torch.tensor([list(ids)])).logits[0]


def greedy(
    model: PreTrainedModel, states: torch.Tensor, ids: Sequence[int], count: int, presence: float = 0.0, start: int = 0
) -> list[int]:
    """The next `count` tokens, past any end of text; never of a near-tie, which sums in another order may resolve.

    `presence` is taken off the logits of what was made, which begins at `start` of ids.
    """
    made: list[int] = []
    for _ in range(count):
        logits = logits_of(model, states, [*ids, *made])[-1]
        if presence:
            logits[list({*ids[start:], *made})] -= presence
        first, second = logits.topk(2).values.tolist()
        assert first - second > 1e-4 * float(logits.abs().max()), "a near-tie: take other chunks"
        made.append(int(logits.argmax()))
    return made
