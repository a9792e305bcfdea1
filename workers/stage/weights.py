"""From the options of a stage to its loaded layers. Knows checkpoints and budgets, and the span that is offered."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schema.errors import Refused
from ...schema.message import Span as Offer
from ..engine.checkpoint import Checkpoint
from ..engine.config import ModelConfig, read_config
from ..engine.errors import CheckpointError
from ..engine.pool import BLOCK
from ..engine.span import DTYPES, Span
from ..engine.split import even_cuts
from ..engine.t5_span import T5Span
from ..models import resolve

log = logging.getLogger("ralmq.stage")


@dataclass(frozen=True, slots=True)
class Place:
    """Which layers of which model: `first` up to, not including, `last`."""

    name: str
    path: Path
    first: int
    last: int
    config: ModelConfig


@dataclass(frozen=True, slots=True)
class Loaded:
    """Layers in memory, and what is said of them in HELLO."""

    span: Span
    offer: Offer
    fingerprint: str

    @property
    def context(self) -> int:
        return self.offer.context

    @property
    def config(self) -> ModelConfig:
        return self.span.config


def place_of(model: str, stage: str, layers: str, name: str) -> Place:
    """The layers that the options name.

    Raises:
        Refused: no such model, or layers that it does not have.
    """
    known, path = resolve(model)
    try:
        config = read_config(path)
    except CheckpointError as error:
        raise Refused(str(error)) from None
    if bool(stage) == bool(layers):
        raise Refused("a stage needs either -o stage=0/2 (place and number of stages) or -o layers=0:6")
    first, last = _even(stage, config.layers) if stage else _numbers(layers, ":", "layers=0:6")
    if not 0 <= first < last <= config.layers:
        raise Refused(f"layers {first}:{last} do not exist: {path} has {config.layers} layers, 0:{config.layers}")
    return Place(name or known, path, first, last, config)


def load(
    place: Place, device: str, dtype: str, kv_mib: int, max_rows: int, packed: bool = True, deterministic: int = 0
) -> Loaded:
    """Reads the layers, and only them; `packed` lays their matrices out for this machine's processor.

    Raises:
        Refused: an unknown dtype, a device that is not there, no room for one block, or a broken checkpoint.
    """
    config = place.config
    if dtype not in DTYPES:
        raise Refused(f"dtype {dtype} is unknown: give one of {', '.join(DTYPES)}")
    tokens = BLOCK * 2 * config.kv_heads * config.head_dim * DTYPES[dtype].itemsize
    useful = max_rows * -(-config.context // BLOCK)
    blocks = min(useful, (kv_mib << 20) // (tokens * (place.last - place.first)))
    if blocks < 1:
        raise Refused(f"kv_mib={kv_mib} holds no KV block of {BLOCK} tokens: give more")
    try:
        fingerprint = Checkpoint(place.path).fingerprint()
        options: dict[str, Any] = {"dtype": dtype, "device": device, "blocks": blocks, "packed": packed}
        options["deterministic"] = deterministic
        kind = T5Span if config.crossed else Span
        span = kind.load(place.path, place.first, place.last, **options, progress=_told)
    except (CheckpointError, ValueError) as error:
        raise Refused(str(error)) from None
    except (RuntimeError, AssertionError) as error:  # torch's own word on a device that is not there
        raise Refused(f"cannot load {place.path} to {device}: {str(error).splitlines()[0]}") from None
    # Stages that cut their calls differently do not give the same bits: they form no pipeline.
    offered = f"{fingerprint}.r{deterministic}" if deterministic else fingerprint
    offer = Offer(place.name, offered, place.first, place.last, config.layers, blocks, max_rows, config.context)
    return Loaded(span, offer, fingerprint)


def _told(done: int, total: int) -> None:
    log.info("loaded %d of %d", done, total)


def _even(stage: str, layers: int) -> tuple[int, int]:
    place, stages = _numbers(stage, "/", "stage=0/2")
    if not 0 <= place < stages <= layers:
        raise Refused(f"stage={stage} does not exist: the model's {layers} layers split into 1 to {layers} stages")
    return even_cuts(layers, stages)[place]


def _numbers(text: str, between: str, example: str) -> tuple[int, int]:
    first, found, second = text.partition(between)
    if not found or not first.strip().isdecimal() or not second.strip().isdecimal():
        raise Refused(f"{text} is not of the form {example}")
    return int(first), int(second)
