"""Encoder states on their way through a pipeline of an encoder-decoder. Knows requests and STEPs, no layer.

The leader counts states as the first tokens of their sequence (see engine/t5_span.py): their blocks, their chunks and
their place in the prefix cache are those of a prompt. Of such a model each STEP has one more tensor, behind the prompts
where there are any: int32 [rows], how many states each row's sequence has; to the first stage, where rows hold some of
them, also the states themselves, joined. From there on they travel as these rows' hidden states.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...schema.errors import Refused
from ...schema.message import Step
from ...schema.tensor import Tensor
from ..base import Request
from ..engine.span import Row
from ..engine.t5 import T5Config
from ..engine.t5_span import CrossRow
from ..params import Task
from ..tensors import to_torch
from .batch import Batch
from .batch import Sequence as Leading
from .weights import Loaded

Array = np.ndarray[Any, Any]


def states_of(request: Request, task: Task, loaded: Loaded) -> Array | None:
    """The encoder's states float32 [n, d] that came with a request; None where the model is a decoder alone.

    Raises:
        Refused: states and model do not go together, or the task is none of an encoder-decoder.
    """
    config, name, tensors = loaded.config, loaded.offer.model, request.tensors
    if not isinstance(config, T5Config):
        if len(tensors) == 2 and len(tensors[1].shape) == 2:
            raise Refused(f"{name} is a decoder-only model, it reads no encoder states: use policy=context")
        return None
    if task.mode == "score":
        raise Refused(f"{name} is an encoder-decoder, which scores no text: use a decoder-only model for that")
    if task.retrieve is not None:
        policy = task.retrieve.policy
        raise Refused(f"{name} is an encoder-decoder, for which policy={policy} is not: ask with policy=encdec")
    if len(tensors) != 2:
        raise Refused(f"no chunks: {name} is an encoder-decoder, send its encoder's states float32 [n, d] with the ids")
    states = tensors[1].numpy()
    if states.dtype != np.float32 or states.ndim != 2 or states.shape[1] != config.hidden or not len(states):
        raise Refused(
            f"the encoder states are {states.dtype} {list(states.shape)}, {name} reads float32 [n, {config.hidden}]: "
            "have the chunks encoded by `ralmq worker t5-encoder` of the same checkpoint"
        )
    if not np.isfinite(states).all():
        raise Refused("the encoder states are not finite: the weights of the encoder may be damaged")
    n, ids = len(states), int(np.prod(tensors[0].shape))
    if n + ids >= loaded.context:
        raise Refused(f"{n} encoder states and {ids} tokens leave no room of {loaded.context}: give fewer chunks")
    return states


def before(task: Task, ids: list[int], states: Array, loaded: Loaded) -> tuple[Task, list[int]]:
    """Task and prompt with states counted as tokens before it. In their places stands the decoder's first token."""
    assert isinstance(loaded.config, T5Config)
    n = len(states)
    changed = {"context": task.context + n, "prompt": task.prompt and task.prompt + n}
    return task.model_copy(update=changed), [loaded.config.start] * n + ids


def remember(sequence: Leading, states: Array) -> None:
    """The first tokens of a sequence are these; equal states with equal tokens behind share blocks."""
    sequence.cross, sequence.states = len(states), states
    sequence.salt = hashlib.blake2b(states.tobytes(), digest_size=16).digest()


def cross_tensors(batch: Batch) -> list[Array]:
    """What a STEP of an encoder-decoder has more."""
    if not batch.cross:
        return []
    counts = [np.asarray(batch.cross, np.int32)]
    return [*counts, np.concatenate(batch.states)] if batch.states else counts


def step_of(batch: Batch) -> Step:
    """A micro-batch as the STEP that says it."""
    tensors = [np.asarray(batch.ids, np.int64)] if batch.rows else []
    if batch.starts:
        tensors.append(np.asarray(batch.prompts, np.int32))
    if batch.cross:
        tensors += cross_tensors(batch)
    return Step(tuple(batch.rows), tuple(batch.starts), (), tuple(batch.ended), batch.number, tensors)


def cross_rows(step: Step, first: bool) -> list[Row]:
    """The rows of a STEP as the layers of an encoder-decoder take them; the first stage's bring their states."""
    place = 1 + bool(step.starts)
    counts = _array(step.tensors[place]).tolist()
    rows: list[Row] = []
    begin = 0
    for row, cross in zip(step.rows, counts, strict=True):
        made = CrossRow(row.position, row.length, list(row.blocks), cross)
        if first and made.remembered:
            end = begin + made.remembered
            made.states, begin = torch.from_numpy(_array(step.tensors[place + 1])[begin:end]), end
        rows.append(made)
    return rows


def onward(step: Step) -> Sequence[Any]:
    """The tensors behind the hidden states that the next stage gets."""
    return step.tensors[1 : 2 + bool(step.starts)]


def _array(tensor: Any) -> Array:
    values: Array = to_torch(tensor).numpy() if isinstance(tensor, Tensor) else tensor
    return values
