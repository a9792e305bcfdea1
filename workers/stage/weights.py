"""From the options of a stage to its loaded layers. Knows checkpoints and budgets, and the span that is offered."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...schema.errors import Refused
from ...schema.message import Span as Offer
from ..engine.checkpoint import Checkpoint
from ..engine.config import ModelConfig, read_config
from ..engine.cuts import even_cuts
from ..engine.errors import CheckpointError
from ..engine.pool import BLOCK
from ..engine.ranked import RankSpan
from ..engine.shard import share_of
from ..engine.span import DTYPES, Span
from ..engine.t5_span import T5Span
from ..models import resolve
from .ranks import Ranks, check_device, device_of

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
    """Layers in memory, and what is said of them in HELLO; `ranks` are the processes that hold the rest of them."""

    span: Span
    offer: Offer
    fingerprint: str
    ranks: Ranks | None = None

    def watch(self, lost: Callable[[str], object]) -> None:
        """Has `lost` called, from any thread, when another process without which nothing can be computed is gone."""
        if self.ranks is not None:
            self.ranks.watch(lost)

    def why(self, said: str) -> str:
        """The reason for which nothing can be computed, in other words than said where more is known; may wait."""
        return self.ranks.why(said) if self.ranks is not None else said

    def close(self) -> None:
        """Ends those processes; waits for that."""
        if self.ranks is not None:
            self.ranks.close()

    @property
    def context(self) -> int:
        return self.offer.context

    @property
    def config(self) -> ModelConfig:
        return self.span.config


def place_of(model: str, stage: str, layers: str, name: str) -> Place:
    """The layers that the options name; none of them with stage=auto, which the broker decides.

    Raises:
        Refused: no such model, or layers that it does not have.
    """
    known, path = resolve(model)
    try:
        config = read_config(path)
    except CheckpointError as error:
        raise Refused(str(error)) from None
    if bool(stage) == bool(layers):
        raise Refused("a stage needs either -o stage=0/2 (place and number of stages), -o layers=0:6 or -o stage=auto")
    if stage.partition("/")[0] == "auto":
        return Place(name or known, path, 0, 0, config)
    first, last = _even(stage, config.layers) if stage else _numbers(layers, ":", "layers=0:6")
    if not 0 <= first < last <= config.layers:
        raise Refused(f"layers {first}:{last} do not exist: {path} has {config.layers} layers, 0:{config.layers}")
    return Place(name or known, path, first, last, config)


def load(
    place: Place,
    device: str,
    dtype: str,
    kv_mib: int,
    max_rows: int,
    packed: bool = True,
    deterministic: int = 0,
    tp: int = 1,
    threads: int = 1,
) -> Loaded:
    """Reads the layers, and only them; `packed` lays their matrices out for this machine's processor.

    With `tp` each of so many processes holds a part of each layer, and `kv_mib` for its part of keys and values.

    Raises:
        Refused: an unknown dtype, a device that is not there, no room for one block, or a broken checkpoint.
        WorkerFailed: a further process ended while it loaded.
    """
    config = place.config
    if dtype not in DTYPES:
        raise Refused(f"dtype {dtype} is unknown: give one of {', '.join(DTYPES)}")
    check_device(device, tp)
    try:
        own = share_of(config, 0, tp)
        fingerprint = Checkpoint(place.path).fingerprint()
    except ValueError as error:
        raise Refused(str(error)) from None
    tokens = BLOCK * 2 * own.kv_heads * own.head_dim * DTYPES[dtype].itemsize
    useful = max_rows * -(-config.context // BLOCK)
    blocks = min(useful, (kv_mib << 20) // (tokens * (place.last - place.first)))
    if blocks < 1:
        raise Refused(f"kv_mib={kv_mib} holds no KV block of {BLOCK} tokens: give more")
    options: dict[str, Any] = {"dtype": dtype, "blocks": blocks, "packed": packed, "deterministic": deterministic}
    ranks = Ranks(tp, place.path, place.first, place.last, device, threads, options) if tp > 1 else None
    try:
        span = _span(place, device, options, ranks)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    # Stages that cut their calls, or sum their parts, differently do not give the same bits: they form no pipeline.
    cut = f".r{deterministic}" + (f".t{tp}" if tp > 1 else "")
    offered = fingerprint + cut if deterministic else fingerprint
    offer = Offer(place.name, offered, place.first, place.last, config.layers, blocks, max_rows, config.context)
    return Loaded(span, offer, fingerprint, ranks)


def _span(place: Place, device: str, options: dict[str, Any], ranks: Ranks | None) -> Span:
    kind: type[Span] = T5Span if place.config.crossed else Span
    try:
        if ranks is None:
            return kind.load(place.path, place.first, place.last, device=device, **options, progress=_told)
        device = device_of(device, 0)
        shard = (0, ranks.size)
        span = RankSpan.load(place.path, place.first, place.last, device=device, shard=shard, **options, progress=_told)
        span.join(ranks.join(device))
        return span
    except (CheckpointError, ValueError) as error:
        raise Refused(str(error)) from None
    except (RuntimeError, AssertionError) as error:  # torch's own word on a device that is not there
        raise Refused(f"cannot load {place.path} to {device}: {str(error).splitlines()[0]}") from None


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
