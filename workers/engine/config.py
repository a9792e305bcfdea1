"""Reads a Hugging Face config.json into a ModelConfig: the one place that says what a model is. Knows no tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .fields import Fields, read_json
from .hf import describe
from .model import ModelConfig
from .readers import READERS, Beyond

__all__ = ["ModelConfig", "read_config", "read_json"]

ENCODERS: Final = ("bert", "roberta", "xlm-roberta", "camembert")  # that `ralmq worker encoder` serves
OTHERS: Final = ("albert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "nomic_bert")


def is_encoder(members: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an encoder of the BERT kind, and not of its decoder."""
    return members.get("model_type") in (*ENCODERS, *OTHERS) and members.get("is_decoder") is not True


def read_config(path: Path, *, adapter: bool = False) -> ModelConfig:
    """The model that a Hugging Face directory describes, in the spellings of transformers 4 and 5.

    A model_type without blocks of our own, or any with `adapter`, is described by transformers (extra hf) and gets the
    family "adapter". Raises CheckpointError for a missing or broken config.json, for an encoder, and for every feature
    that the engine would get wrong.
    """
    fields = Fields(path / "config.json", read_json(path / "config.json"))
    model_type = fields.members.get("model_type")
    if not isinstance(model_type, str):
        raise fields.fail(f"model_type is {model_type!r} where a name is needed; use one of {', '.join(READERS)}")
    if fields.members.get("quantization_config") is not None:
        raise fields.fail(
            "quantized checkpoints (quantization_config) are not read; use the model in fp32, bf16 or fp16"
        )
    eos_ids = fields.token_ids("eos_token_id")
    generation = path / "generation_config.json"
    if generation.exists():
        eos_ids += Fields(generation, read_json(generation)).token_ids("eos_token_id")
    bos_ids = fields.token_ids("bos_token_id")
    stops, bos_id = tuple(dict.fromkeys(eos_ids)), bos_ids[0] if bos_ids else None
    if model_type in READERS and not adapter:
        try:
            return READERS[model_type](fields, stops, bos_id)
        except Beyond:
            pass
    if is_encoder(fields.members):
        how = f"serve it with `ralmq worker encoder -o model={path}`"
        if model_type in OTHERS:
            how = f"and `ralmq worker encoder` serves those of {', '.join(ENCODERS)} alone"
        raise fields.fail(f"model_type {model_type!r} is an encoder, which generates no text: {how}")
    return describe(fields, stops, bos_id)
