"""What a directory says of how texts become vectors: pooling, longest text. Knows its JSON files, no tensor."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..engine.errors import CheckpointError
from ..engine.fields import Fields, read_json
from .model import Pooling

MODULES: Final = "modules.json"
LIMITS: Final = (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length"))
POOLINGS: Final[dict[str, Pooling]] = {
    "mean": "mean",
    "cls": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a text becomes a vector: `tokens` is how many of it are read, special ones included."""

    pooling: Pooling
    tokens: int


def read_settings(path: Path, context: int, pooling: Pooling | None = None) -> Settings:
    """The settings of a sentence-transformers directory; of a plain one, mean and the context.

    Args:
        context: tokens that the model's positions allow.
        pooling: wins over what the directory says.

    Raises:
        CheckpointError: it asks for a pooling, or for a layer behind it, that is not computed.
    """
    for module in _modules(path / MODULES):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = pooling or _pooling(path, str(module.get("path", "")))
        elif kind not in ("Transformer", "Normalize"):
            raise CheckpointError(f"{path / MODULES}: a {kind} layer is not computed; use a model without one")
    tokens = context
    for name, member in LIMITS:
        if (path / name).is_file():
            limit = Fields(path / name, read_json(path / name)).optional(member)
            tokens = int(min(tokens, limit or tokens))  # without a limit of its own a tokenizer says 1e30
    return Settings(pooling or "mean", tokens)


def _modules(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download the file again") from None
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise CheckpointError(f"{path}: holds no list of modules; download the file again")
    return found


def _pooling(path: Path, folder: str) -> Pooling:
    if Path(folder).name != folder:
        raise CheckpointError(f"{path / MODULES}: {folder!r} is no folder of this directory; download the file again")
    fields = Fields(path / folder / "config.json", read_json(path / folder / "config.json"))
    named = fields.members.get("pooling_mode")
    flags = [name for name, value in fields.members.items() if name.startswith("pooling_mode_") and value is True]
    chosen = [str(named)] if named is not None else flags
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        said = " and ".join(chosen) or "none"
        raise fields.fail(f"asks for the pooling {said}, which is not computed; give -o pooling=mean or cls")
    return POOLINGS[chosen[0]]
