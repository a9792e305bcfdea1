"""The sizes of a model directory as a planner wants them, from its config and its files' headers. Knows no torch."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Final

from ..schema.errors import Refused
from ..schema.plan.model import Model
from .engine.config import ModelConfig, read_config
from .engine.cuts import parts_of
from .engine.errors import CheckpointError
from .engine.headers import Headers
from .models import resolve

SIZES: Final = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 4}  # of activations, keys and values, embedding and norms
MATRIX: Final = {"int8": 1}  # of the elements of matrices, where that is another size
SCALE: Final = 4  # bytes of the scale of an int8 matrix's row


def weigh(model: str, dtype: str = "fp32", name: str = "") -> Model:
    """What each layer of a model holds in memory, in the dtype of a stage's option.

    Raises:
        Refused: no such model, a part of one, a broken one, or an unknown dtype.
    """
    known, path = resolve(model)
    try:
        return weighed(path, name or known, dtype)
    except CheckpointError as error:
        raise Refused(str(error)) from None


def weighed(path: Path, name: str, dtype: str) -> Model:
    """As `weigh`, of a directory.

    Raises:
        CheckpointError, Refused: see there.
    """
    if dtype not in SIZES:
        raise Refused(f"dtype {dtype} is unknown: give one of {', '.join(SIZES)}")
    config = read_config(path)
    headers = Headers(path)
    parts = parts_of(headers, config)
    for number, names in enumerate(parts.layers):
        if not names:  # a part of a model, as `ralmq split` makes it, or files that do not belong to the config
            headers.entry(f"of layer {number}")
    size = SIZES[dtype]

    def elements(name: str) -> int:
        return prod(headers.entry(name).shape)

    def matrix(name: str) -> int:
        shape = headers.entry(name).shape
        if len(shape) < 2 or dtype not in MATRIX:
            return prod(shape) * size
        return prod(shape) * MATRIX[dtype] + shape[0] * SCALE

    layers = tuple(sum(map(matrix, names)) for names in parts.layers)
    reads = tuple(
        held - _resting(config, number, names, matrix)
        for number, (held, names) in enumerate(zip(layers, parts.layers, strict=True))
    )
    shared = set(parts.first) & set(parts.last) if dtype not in MATRIX else set()
    return Model(
        name=name,
        layers=layers,
        reads=reads,
        kv=2 * config.kv_heads * config.head_dim * size,
        first=sum(elements(name) for name in parts.first) * size,
        last=sum(map(matrix, parts.last)),
        shared=sum(elements(name) for name in shared) * size,
        each=sum(elements(name) for name in parts.each) * size,
    )


def _resting(config: ModelConfig, layer: int, names: list[str], size: Callable[[str], int]) -> int:
    """Bytes of the experts that a token does not run through."""
    experts = config.experts
    if experts is None or layer not in experts.layers:
        return 0
    held = sum(size(name) for name in names if ".experts." in name)
    return held * (experts.count - experts.active) // experts.count
