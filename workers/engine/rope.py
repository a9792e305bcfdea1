"""What a config.json says of rotary positions; knows no layer and no tensor.

transformers 5 keeps everything in rope_parameters (by layer type where layers differ), 4 in rope_theta,
rope_local_base_freq, partial_rotary_factor and rope_scaling.
"""

import math

from .fields import Fields
from .model import Rope

LOCAL_THETA = 10000.0


def read_ropes(fields: Fields, head_dim: int, context: int, theta: float, local: bool) -> tuple[Rope, ...]:
    """One Rope, or with `local` two: of layers without and with a window. `theta` is the family's own base."""
    parameters = fields.within("rope_parameters")
    if not local:
        name = "rope_parameters" if parameters.members else "rope_scaling"
        return (_read(fields, fields.within(name), name, head_dim, context, fields.real("rope_theta", theta)),)
    if not parameters.members:
        theta, near = fields.real("rope_theta", theta), fields.real("rope_local_base_freq", LOCAL_THETA)
        scaling = fields.within("rope_scaling")
        return _read(fields, scaling, "rope_scaling", head_dim, context, theta), Rope(near, head_dim)
    everywhere, windowed = parameters.within("full_attention"), parameters.within("sliding_attention")
    return (
        _read(fields, everywhere, "rope_parameters", head_dim, context, theta),
        _read(fields, windowed, "rope_parameters", head_dim, context, LOCAL_THETA),
    )


def _read(fields: Fields, rope: Fields, name: str, head_dim: int, context: int, theta: float) -> Rope:
    theta = rope.real("rope_theta", theta)
    share = rope.real("partial_rotary_factor", fields.real("partial_rotary_factor", 1.0))
    dims = int(head_dim * share)
    if dims % 2 or not 0 < dims <= head_dim:
        raise fields.fail(
            f"partial_rotary_factor {share} of head_dim {head_dim} gives {dims} rotary dimensions where an even number "
            "of them is needed; mend one of them in this file"
        )
    kind = rope.members.get("rope_type", rope.members.get("type", "default"))
    if fields.members.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # how the first Phi-3 models spelled it
    if kind == "default":
        return Rope(theta, dims)
    if kind == "linear":
        return Rope(theta, dims, "linear", rope.real("factor"))
    if kind == "llama3":
        original = rope.integer("original_max_position_embeddings", context)
        low, high = rope.real("low_freq_factor", 1.0), rope.real("high_freq_factor", 4.0)
        return Rope(theta, dims, "llama3", rope.real("factor", 8.0), low, high, original)
    if kind == "yarn":
        return _yarn(rope, theta, dims, context)
    if kind == "longrope":
        return _longrope(fields, rope, theta, dims, context)
    raise fields.fail(
        f"{name} {kind!r} is not supported; use a model with default, linear, llama3, yarn or longrope rotary positions"
    )


def _yarn(rope: Fields, theta: float, dims: int, context: int) -> Rope:
    original = rope.integer("original_max_position_embeddings", context)
    factor = rope.real("factor", context / original)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude, whole = rope.optional("mscale"), rope.optional("mscale_all_dim")
    inferred = scale(amplitude) / scale(whole) if amplitude and whole else scale(1.0)
    return Rope(
        theta,
        dims,
        "yarn",
        factor,
        rope.real("beta_slow", 1.0),
        rope.real("beta_fast", 32.0),
        original,
        rope.real("attention_factor", inferred),
        rope.flag("truncate", True),
    )


def _longrope(fields: Fields, rope: Fields, theta: float, dims: int, context: int) -> Rope:
    """The short factors. The long ones would change the keys of all earlier tokens when a sequence grows past
    `original_context`, so that the model's context ends there."""
    inside = rope.integer("original_max_position_embeddings", context)
    original = fields.integer("original_max_position_embeddings", inside)
    factor = rope.real("factor", context / original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        theta,
        dims,
        "longrope",
        original_context=original,
        amplitude=rope.real("attention_factor", inferred),
        factors=rope.numbers("short_factor", dims // 2),
    )
