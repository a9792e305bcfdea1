"""The built-in worker `t5-encoder`: serves `encode:<name>`, chunks to an encoder's states. Knows no decoder."""

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer

from ...schema.errors import Refused
from ...schema.limits import MAX_MESSAGE
from ...schema.message import Beat
from ..base import Answer, Request
from ..engine.t5_encoder import T5Encoder
from ..vocabulary import read_tokenizer
from .base import ModelWorker

MAX_CHUNKS: Final = 1024  # of one request
MAX_STATES: Final = MAX_MESSAGE - (1 << 20)  # bytes of the states of one answer
FORM: Final = "chunks: give a list of texts, or of lists of token ids that are not empty"


class StateEncoder(ModelWorker):
    """The encoder of an encoder-decoder, whose decoder is in pipeline stages.

    A body {"chunks": [...]}, texts or lists of token ids, is answered with {"model": name, "lengths": [tokens of each]}
    and their states, joined, float32 [sum of lengths, d]. No chunk sees another; one that is longer than `tokens` is
    cut, and a text keeps its end token.

    Args:
        model: a Hugging Face directory of the T5 family.
        name: the service is encode:<name>; the directory's name where not given.
        threads: of torch.
        tokens: of a chunk, at most.
        batch: chunks that are computed at once.
    """

    capacity = 16

    def __init__(self, *, model: str, name: str = "", threads: int = 1, tokens: int = 512, batch: int = 32) -> None:
        for option, value in (("threads", threads), ("tokens", tokens - 1), ("batch", batch)):
            if value < 1:
                raise Refused(f"-o {option} is too small: give at least {2 if option == 'tokens' else 1}")
        super().__init__("encode", model, name, threads)
        self._tokens = tokens
        self._batch = batch
        self._runs = 0
        self._chunks = 0
        self._tokenizer: Tokenizer | None = None

    async def start(self) -> None:
        """Reads weights and, where there is one, the tokenizer; only then is the service announced.

        Raises:
            Refused: the directory is no encoder-decoder, or something in it is broken.
        """
        self._encoder = await self._loaded(partial(T5Encoder, self._path))
        file = self._path / "tokenizer.json"
        if file.is_file():
            self._tokenizer = read_tokenizer(file)
            self._tokenizer.enable_truncation(self._tokens)
        self.identity = f"t5-encoder {await self._loaded(self._fingerprint)}"

    def beat(self, beat: Beat) -> Beat:
        """`runs`: requests that were encoded, with so many `chunks` in all."""
        return replace(beat, gauges={"runs": self._runs, "chunks": self._chunks})

    async def handle(self, request: Request) -> Answer:
        chunks = self._ids(request.body.get("chunks"))
        loop = asyncio.get_running_loop()
        try:
            states = await loop.run_in_executor(self._compute, self._encoded, chunks)
        except ValueError as error:
            raise Refused(f"chunks: {error}") from None
        self._runs += 1
        self._chunks += len(chunks)
        return {"model": self._name, "lengths": [len(chunk) for chunk in chunks]}, [states]

    def _ids(self, given: Any) -> list[list[int]]:
        """Token ids of each chunk.

        Raises:
            Refused: something else, or none, or a text where there is no tokenizer.
        """
        if not isinstance(given, list) or not given:
            raise Refused(f"no {FORM}" if given == [] else FORM)
        if len(given) > MAX_CHUNKS:
            raise Refused(f"chunks: {len(given)} of them are too many; give at most {MAX_CHUNKS} at once")
        chunks: list[list[int]] = []
        for chunk in given:
            if isinstance(chunk, str):
                if self._tokenizer is None:
                    raise Refused(f"{self._path}/tokenizer.json does not exist: add it, or give chunks as token ids")
                ids: Any = self._tokenizer.encode(chunk).ids
            else:
                ids = chunk[: self._tokens] if isinstance(chunk, list) else None
            if not ids or not all(type(token) is int and 0 <= token < self._encoder.config.vocab for token in ids):
                raise Refused(f"{FORM}, of 0 to {self._encoder.config.vocab - 1}")
            chunks.append(ids)
        total = sum(map(len, chunks))
        if total > (most := MAX_STATES // (4 * self._encoder.config.hidden)):
            raise Refused(f"chunks: they have {total} tokens, an answer holds the states of {most}; give fewer at once")
        return chunks

    def _encoded(self, chunks: list[list[int]]) -> np.ndarray[Any, Any]:
        """In the compute thread."""
        parts = [self._encoder(chunks[at : at + self._batch]) for at in range(0, len(chunks), self._batch)]
        return torch.cat(parts).numpy()
