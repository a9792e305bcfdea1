"""The built-in worker `encoder`: serves `embed:<name>`, texts to vectors. Knows requests and texts, no layer."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from ...schema.errors import Refused
from ..base import Answer, Request
from ..vocabulary import read_tokenizer
from .base import ModelWorker
from .model import Encoder as Model
from .model import Pooling, load_encoder
from .settings import Settings, read_settings

MAX_TEXTS: Final = 4096  # of one request
NO_VECTOR: Final = "texts: one of them has no vector: none of its tokens is known to the model"
Array = np.ndarray[Any, Any]


class Encoder(ModelWorker):
    """Vectors of texts. Requests that come together are computed together.

    A body {"texts": [...]} is answered with {"model": name} and vectors float32 [texts, d]; a text that is longer than
    the model reads is cut, as sentence-transformers does.

    Args:
        model: a Hugging Face directory of a BERT-like encoder, plain or of sentence-transformers.
        name: the service is embed:<name>; the directory's name where not given.
        pooling: mean or cls; what the directory says where not given, else mean.
        normalize: scale vectors to length 1, so that inner products are cosines.
        threads: of torch.
        batch: texts that are computed at once, and requests that are taken together.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str = "",
        pooling: Pooling | None = None,
        normalize: bool = True,
        threads: int = 1,
        batch: int = 32,
    ) -> None:
        for option, value in (("threads", threads), ("batch", batch)):
            if value < 1:
                raise Refused(f"-o {option}={value} is too small: give at least 1")
        super().__init__("embed", model, name, threads)
        self._pooling = pooling
        self._normalize = normalize
        self._batch = batch
        self.max_batch = max(2, batch)  # 1 would turn `handle_batch` off
        self.capacity = 4 * self.max_batch  # some fill the next batch while one is computed

    async def start(self) -> None:
        """Reads weights and tokenizer; only then is the service announced.

        Raises:
            Refused: the directory is no encoder that is computed, or holds no tokenizer.
        """
        self._model, self._settings = await self._loaded(self._load)
        self._tokenizer = _tokenizer(self._path / "tokenizer.json", self._settings.tokens, self._model.config.vocab)
        scaled = "" if self._normalize else ", not normalised"
        self.identity = f"encoder {await self._loaded(self._fingerprint)}, {self._settings.pooling}{scaled}"

    async def handle_batch(self, requests: list[Request]) -> list[Answer]:
        """One refused does not keep the others from their vectors."""
        answers: list[Answer] = []
        texts: list[str] = []
        for request in requests:
            try:
                given = _texts(request)
            except Refused as refused:
                answers.append(refused)
                continue
            answers.append(slice(len(texts), len(texts) + len(given)))
            texts += given
        if texts:
            vectors = await self._computed(texts)
        body = {"model": self._name}
        for place, answer in enumerate(answers):
            if isinstance(answer, slice):
                found = vectors[answer]
                answers[place] = (body, [found]) if np.isfinite(found).all() else Refused(NO_VECTOR)
        return answers

    async def _computed(self, texts: Sequence[str]) -> Array:
        """Beside the event loop; given up, it ends with the texts that are under way."""
        stop = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._compute, self._encoded, texts, stop)
        finally:
            stop.set()

    # -- in the compute thread

    def _load(self) -> tuple[Model, Settings]:
        model = load_encoder(self._path)
        return model, read_settings(self._path, model.config.context, self._pooling)

    def _encoded(self, texts: Sequence[str], stop: threading.Event) -> Array:
        """float32 [texts, d], NaN for one without a token.

        Those of similar length are computed together, so that little of a call is padding.
        """
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        order = sorted((place for place in range(len(rows)) if rows[place]), key=lambda place: len(rows[place]))
        vectors = np.full((len(rows), self._model.config.hidden), np.nan, np.float32)
        for start in range(0, len(order), self._batch):
            if stop.is_set():
                break
            places = order[start : start + self._batch]
            chosen = [rows[place] for place in places]
            vectors[places] = self._model(chosen, self._settings.pooling, self._normalize).numpy()
        return vectors


def _texts(request: Request) -> list[str]:
    texts = request.body.get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise Refused("texts: give a list of texts that are not empty")
    if len(texts) > MAX_TEXTS:
        raise Refused(f"texts: {len(texts)} of them are too many; give at most {MAX_TEXTS} at once")
    return texts


def _tokenizer(path: Path, tokens: int, vocab: int) -> Tokenizer:
    if not path.is_file():
        raise Refused(f"{path}: no such file; copy the model's own, without it no text can be read")
    tokenizer = read_tokenizer(path)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab:
        raise Refused(f"{path} knows token {largest}, the model {vocab} of them: copy the model's own")
    try:
        tokenizer.enable_truncation(tokens)
        if tokenizer.num_special_tokens_to_add(False) >= tokens:
            raise ValueError
    except Exception:
        raise Refused(f"{path}: {tokens} tokens leave no room for a text beside the special ones") from None
    return tokenizer
