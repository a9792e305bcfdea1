"""What an encoder-decoder reads through its encoder, anew each interval. Knows texts, ids and states; no pipeline.

At new tokens 0, r, 2r ... chunks are retrieved and encoded, and the decoder goes on with them from its own tokens
(interval and encoder-decoder as in RALM: Jiang et al. 2023, "Chameleon"; chunks beside one another: Izacard and
Grave 2021). The tokens before are computed anew with them: a text depends on its tokens and the last chunks alone.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from ...client.client import Client
from ...client.results import Reply
from ...schema.errors import Refused, WorkerFailed
from ..engine.config import read_config, read_json
from ..engine.errors import CheckpointError
from ..engine.t5 import MODEL_TYPES, T5Config
from .again import kept
from .context import Find, Frame, text_of

INTERVAL: Final = 64  # new tokens, where none is given
RETRIES: Final = 8  # resends to an encoder whose queue is full

Chunk = str | Sequence[int]
Encode = Callable[[Sequence[Chunk]], Awaitable[np.ndarray[Any, Any]]]
"""States float32 [n, d] of chunks, joined."""


def start_of(path: Path) -> int | None:
    """The token that an encoder-decoder's decoder begins with; None for a decoder-only model.

    Raises:
        Refused: config.json is broken.
    """
    try:
        if read_json(path / "config.json").get("model_type") not in MODEL_TYPES:
            return None
        config = read_config(path)
    except CheckpointError as error:
        raise Refused(str(error)) from None
    return config.start if isinstance(config, T5Config) else None


def check_policy(model: str, crossed: bool, policy: str) -> None:
    """`policy` is empty where nothing is retrieved.

    Raises:
        Refused: the model cannot follow it.
    """
    if policy == "encdec" and not crossed:
        raise Refused(f"{model} is a decoder-only model, policy=encdec needs an encoder-decoder: give policy=context")
    if crossed and not policy:
        raise Refused(f"no chunks: {model} is an encoder-decoder, give policy=encdec with retrieve=INDEX or chunks")
    if crossed and policy != "encdec":
        raise Refused(f"{model} is an encoder-decoder, for which policy={policy} is not: give policy=encdec")


@dataclass(frozen=True, slots=True)
class Reading:
    """How chunks are retrieved, and shown.

    Attributes:
        chunks: given by the client: they serve for the whole text, and none are retrieved.
        interval: new tokens after which chunks are retrieved anew.
        tokens: how many of the last ones, of prompt and output, are the query.
        most: new tokens in all.
        start: the decoder's first token.
        shown: the reader is to see what was retrieved.
    """

    chunks: Sequence[Chunk] | None
    interval: int
    tokens: int
    most: int
    start: int
    shown: bool


class Chunks:
    """The frames of one text; within an interval states stay the same, so that a replay reads what was read before.

    Args:
        find: retrieves; with a tokenizer, where no chunks were given.
    """

    def __init__(
        self, encode: Encode, find: Find | None, reading: Reading, tokenizer: Tokenizer | None, prompt: Sequence[int]
    ) -> None:
        self._encode = encode
        self._find = find
        self._reading = reading
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._frame: Frame | None = None

    async def frame(self, made: Sequence[int]) -> Frame:
        """The frame in which the next token is generated: the decoder's first token, and what its states are.

        Raises:
            Refused: what was found holds no text.
            RalmqError: as index and encoder answer.
        """
        reading = self._reading
        begin, until = 0, reading.most
        if reading.chunks is None:
            begin = len(made) - len(made) % reading.interval
            until = min(begin + reading.interval, reading.most)
        if self._frame is None or self._frame.begin != begin:
            found = await self._found(made[:begin]) if reading.chunks is None else []
            # Where nothing is found the encoder reads an empty text: the decoder needs something to attend to.
            states = await self._encode(reading.chunks or [text_of(passage) for passage in found] or [""])
            shown, first = found if reading.shown else [], [reading.start]
            self._frame = Frame(begin, until, until == reading.most, 0, first, (), shown, states)
        return self._frame

    async def _found(self, made: Sequence[int]) -> list[dict[str, Any]]:
        assert self._tokenizer is not None and self._find is not None
        asked = [*self._prompt, *made][-self._reading.tokens :]
        text = self._tokenizer.decode(asked)
        return [passage for passage in await self._find(asked, text) if text_of(passage)] if text.strip() else []


async def encoded(
    client: Client, model: str, chunks: Sequence[Chunk], left: Callable[[], float], parent: bytes, wait: float
) -> np.ndarray[Any, Any]:
    """States of chunks from `encode:<model>`. Where its worker is lost, another one or its return is waited for.

    Args:
        left: seconds until the text's deadline.
        wait: seconds to wait for an encoder that nobody offers.

    Raises:
        WorkerFailed: it was lost each time that it was asked, or what it answers are no states.
        RalmqError: as it answers.
    """
    service = f"encode:{model}"
    body = {"chunks": [chunk if isinstance(chunk, str) else list(chunk) for chunk in chunks]}

    async def ask(lost: bool) -> Reply:
        seconds = left()
        waits = seconds if lost else wait
        return await client.request(service, body, deadline=seconds, parent=parent, retries=RETRIES, wait_service=waits)

    reply = await kept(service, ask)
    if len(reply.tensors) != 1:
        raise WorkerFailed(f"{service} answers without states: is it `ralmq worker t5-encoder`?")
    return reply.tensors[0].numpy()
