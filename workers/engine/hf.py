"""What transformers (extra hf) says of models for which we have no blocks; imports it only when asked. No tensor."""

from typing import Any

from .errors import CheckpointError
from .fields import Fields
from .model import ADAPTER, ModelConfig

# The first of these that a config has; no two architectures agree on them.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_INTERMEDIATE = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "inner_hidden_size")
_ALIBI_CONTEXT = 2048  # positions of a model whose config bounds them nowhere


def load_config(path: Any) -> Any:
    """transformers' config of a model directory; CheckpointError without transformers or for an unknown model_type."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise CheckpointError(
            f"{path / 'config.json'}: this model_type runs on transformers' layers, which are not installed; "
            "run: pip install 'ralmq[hf]'"
        ) from None
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # It raises whatever its validators raise.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path / 'config.json'}: transformers does not read it ({cause}); use a model_type that it knows"
        ) from None


def describe(fields: Fields, eos_ids: tuple[int, ...], bos_id: int | None) -> ModelConfig:
    """The sizes of a model as its transformers config gives them. What its layers do is not in this record."""
    config = load_config(fields.path.parent)
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        raise fields.fail(f"model_type {config.model_type!r} is no text decoder alone; use a decoder-only model")
    sizes = {name: getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    missing = [name for name, value in sizes.items() if not isinstance(value, int)]
    if missing:
        raise fields.fail(
            f"model_type {config.model_type!r} has no {missing[0]}, so it is no decoder with attention; "
            "use a decoder-only language model"
        )
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    kv_heads = 1 if getattr(config, "multi_query", False) else _first(config, _KV_HEADS, heads)
    return ModelConfig(
        family=ADAPTER,
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_first(config, ("head_dim", "kv_channels"), hidden // heads),
        intermediate=_first(config, _INTERMEDIATE, 4 * hidden),
        vocab=int(config.vocab_size),
        context=_first(config, _CONTEXT, _ALIBI_CONTEXT),
        norm_eps=1e-5,
        activation="",
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        eos_ids=eos_ids,
        bos_id=bos_id,
    )


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), default)
