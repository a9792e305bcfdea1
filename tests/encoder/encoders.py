"""Tiny random encoders of the BERT family as transformers writes them, with a word tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(60))]
CONTEXT = 24


def tokenizer() -> Tokenizer:
    """Splits at spaces, [CLS] before and [SEP] behind; truncates and pads, as those of sentence-transformers do."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(5)
    made.enable_padding(length=9)
    return made


def write(out: Path, family: str = "bert", files: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Writes a random encoder, with further JSON `files`; `changes` go to its transformers config."""
    shape = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT + (0 if family == "bert" else 2),
        "type_vocab_size": 2 if family == "bert" else 1,
        **changes,
    }
    torch.manual_seed(3)
    model = AutoModel.from_config(AutoConfig.for_model(family, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh ones are small, zero or one: a forgotten bias would not show
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(out)
    tokenizer().save(str(out / "tokenizer.json"))
    for name, content in (files or {}).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(json.dumps(content))
    return out


def oracle(path: Path, rows: Sequence[Sequence[int]], pooling: str, normalize: bool) -> torch.Tensor:
    """What transformers computes for each text alone, pooled as Reimers and Gurevych 2019 say."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for row in rows:
            states = model(torch.tensor([row])).last_hidden_state[0]
            found.append(states[0] if pooling == "cls" else states.mean(0))
    vectors = torch.stack(found)
    return vectors / vectors.norm(dim=1, keepdim=True) if normalize else vectors
