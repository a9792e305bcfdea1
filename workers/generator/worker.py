"""The built-in worker `generator`: serves `generate:<model>` and `embed:<model>` over `lm:<model>`. Knows no torch."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...schema.errors import Refused, WorkerFailed
from ..base import Answer, Request, Worker
from ..models import resolve
from .options import Options, wire
from .text import Text

RETRIES = 8  # resends to a pipeline whose queue is full
MOST = 0x7FFF_FFFF  # token ids travel as int32


class Generator(Worker):
    """Text from prompts.

    Args:
        model: a Hugging Face directory, or demo; its tokenizer.json is used. Without one token ids serve.
        name: the model's name; the directory's name where not given.
        capacity: requests at a time.
    """

    def __init__(self, *, model: str, name: str = "", capacity: int = 128) -> None:
        known, path = resolve(model)
        self.capacity = capacity
        self._model = name or known
        self._path = path / "tokenizer.json"
        self._tokenizer: Tokenizer | None = None

    @property
    def services(self) -> tuple[str, ...]:
        return f"generate:{self._model}", f"embed:{self._model}"

    async def start(self) -> None:
        """Reads the tokenizer.

        Raises:
            Refused: tokenizer.json is broken.
        """
        if self._path.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(self._path))
            except Exception as error:  # the library raises plain Exception
                raise Refused(f"{self._path} cannot be read ({error}): copy it anew from the model") from None
            tokenizer.no_truncation()  # a prompt that is too long is refused, not cut in silence
            tokenizer.no_padding()
            self._tokenizer = tokenizer

    def handle(self, request: Request) -> Any:
        return self._embed(request) if request.service.startswith("embed:") else self._generate(request)

    async def _generate(self, request: Request) -> AsyncIterator[Answer]:
        """One part a token; the end says why, how many, and gives the text that was held back."""
        options = Options.of(request.body)
        ids = self._prompt(options, request)
        task = options.task()
        text = Text(self._tokenizer, ids, options.stop)
        body: dict[str, Any] = {}
        stream = self.host.client.stream(
            f"lm:{self._model}",
            wire(task),
            tensors=[np.asarray(ids, np.int32)],
            deadline=self._left(request),
            parent=request.id,
            retries=RETRIES,
        )
        made = 0
        async with stream:
            async for part in stream:
                made += 1
                body = part.body
                yield {**body, "text": text.push(body["token"])}
                if text.stopped:
                    break
        tail = text.flush()
        reason = "stop" if text.stopped else (stream.final.body if stream.final else {}).get("finish_reason", "length")
        usage = {"prompt_tokens": len(ids), "completion_tokens": made, "seed": task.seed}
        request.ending = {
            "finish_reason": reason,
            "usage": usage,
            "text": tail,
            "position": body.get("position", len(ids)),
        }

    async def _embed(self, request: Request) -> Answer:
        """Texts to vectors [texts, d]: the hidden state of each text's last token at the last layer's FFN input."""
        texts = request.body.get("texts")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise Refused("texts: give a list of texts that are not empty")
        tokenizer = self._needed("to embed text")
        ids = [tokenizer.encode(text).ids for text in texts]
        if not all(ids):
            raise Refused("texts: one of them has no token")
        return {"model": self._model}, [np.stack(await asyncio.gather(*[self._state(row, request) for row in ids]))]

    async def _state(self, ids: Sequence[int], request: Request) -> Any:
        """A score computes states of all tokens but the last, so one more is appended, whichever it is."""
        stream = self.host.client.stream(
            f"lm:{self._model}",
            {"mode": "score"},
            tensors=[np.asarray([*ids, 0], np.int32)],
            deadline=self._left(request),
            parent=request.id,
            retries=RETRIES,
        )
        state = None
        async for part in stream:
            state = part.tensors[0].numpy()[-1]
        if state is None:
            raise WorkerFailed(f"lm:{self._model} scored without hidden states: restart its stages")
        return state

    def _prompt(self, options: Options, request: Request) -> list[int]:
        if options.prompt is None:
            if len(request.tensors) != 1:
                raise Refused("no prompt: give text, or token ids as one int32 tensor")
            given = request.tensors[0].numpy()
            if given.dtype.kind not in "iu" or given.ndim != 1 or not len(given):
                raise Refused(f"the prompt is {given.dtype} {list(given.shape)}: give at least one id, int32 [n]")
            if int(given.min()) < 0 or int(given.max()) > MOST:
                raise Refused("the prompt has ids that no vocabulary holds: give those of the model's tokenizer")
            return [int(token) for token in given]
        ids: list[int] = self._needed("for a prompt of text").encode(options.prompt).ids
        if not ids:
            raise Refused("the prompt is empty: give at least one token")
        return ids

    def _needed(self, why: str) -> Tokenizer:
        if self._tokenizer is None:
            raise Refused(f"{self._path} does not exist and is needed {why}: add it, or give token ids")
        return self._tokenizer

    def _left(self, request: Request) -> float:
        """Seconds until the asker's deadline."""
        if not request.deadline:
            return 600.0
        return max(0.001, request.deadline - asyncio.get_running_loop().time())
