"""The built-in worker `generator`: serves `generate:<model>` and `embed:<model>` over `lm:<model>`. Knows no torch."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...client.stream import Stream
from ...schema.errors import Refused, WorkerFailed
from ...schema.limits import MAX_TOKEN_ID
from ...schema.message import Beat
from ..base import Answer, Request, Worker
from ..models import resolve
from ..params import Task
from ..vocabulary import read_tokenizer
from .context import Context, Framing, Strides
from .encdec import INTERVAL, Chunks, Reading, check_policy, encoded, start_of
from .merge import merged
from .options import Options, wire
from .passages import Passages
from .replay import Replay
from .text import Text

RETRIES = 8  # resends to a pipeline whose queue is full
MAX_TEXTS = 4096  # of one request to be embedded
EMBEDDED = 64  # of them that the pipeline is asked for at a time: its queue is everybody's


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
        self._start = start_of(path)  # of an encoder-decoder
        self._tokenizer: Tokenizer | None = None
        self._suspects = asyncio.Lock()
        self._length = 0  # tokens that the model reads; 0: not asked yet
        self._replayed = 0  # tokens that went to a pipeline again

    @property
    def services(self) -> tuple[str, ...]:
        generate = f"generate:{self._model}"
        return (generate, f"embed:{self._model}") if self._start is None else (generate,)  # of those stages score none

    async def start(self) -> None:
        """Reads the tokenizer.

        Raises:
            Refused: tokenizer.json is broken.
        """
        if self._path.is_file():
            self._tokenizer = read_tokenizer(self._path)
            self._tokenizer.no_truncation()  # a prompt that is too long is refused, not cut in silence
        self.identity = await asyncio.to_thread(_identity, self._path)

    def beat(self, beat: Beat) -> Beat:
        return replace(beat, gauges={"replayed_tokens": self._replayed})

    def handle(self, request: Request) -> Any:
        return self._embed(request) if request.service.startswith("embed:") else self._generate(request)

    async def _generate(self, request: Request) -> AsyncIterator[Answer]:
        """One part a token, the prompt's first where they are to be echoed; the end says why, and how many.

        Of several texts each part names its `index`, and one without a token ends each of them.
        """
        options = Options.of(request.body)
        retrieves = options.retrieve is not None or options.chunks is not None
        check_policy(self._model, self._start is not None, options.policy if retrieves else "")
        ids = self._prompt(options, request)
        tasks = options.tasks()
        seeds = [task.seed for task in tasks]
        made = options.made or ((),) * len(tasks)
        usage: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": sum(map(len, made)), "seed": seeds[0]}
        if len(tasks) > 1:
            usage["seeds"] = seeds
        if options.echo:
            async with aclosing(self._echoed(options, ids, request)) as echoed:
                parts = [part async for part in echoed]
            for index in range(len(tasks)):
                for part in parts:
                    yield {**part, "index": index} if len(tasks) > 1 else part
        ends: list[dict[str, Any]] = [{"finish_reason": "length", "text": "", "position": len(ids)} for _ in tasks]
        if options.max_tokens:
            choices = [
                self._choice(options, ids, place, *pair, request)
                for place, pair in enumerate(zip(tasks, ends, strict=True))
            ]
            async with aclosing(merged(choices) if len(tasks) > 1 else _alone(choices[0])) as parts_of_all:
                async for index, part in parts_of_all:
                    usage["completion_tokens"] += part["token"] >= 0
                    yield {**part, "index": index} if len(tasks) > 1 else part
        elif len(tasks) > 1:
            for index, end in enumerate(ends):
                yield {"token": -1, **end, "index": index}
        request.ending = {**ends[0], "usage": usage}
        if len(tasks) > 1:
            request.ending["text"] = ""  # it came with its part

    async def _choice(
        self, options: Options, ids: list[int], place: int, task: Task, end: dict[str, Any], request: Request
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The parts of one text; `end` then holds its finish_reason, the text that was held back, and its position.

        What an earlier generator made of it goes through `text` alone: the asker has it.
        """
        text = Text(self._tokenizer, ids, options.stop, options.min_tokens)
        made = list(options.made[place]) if options.made else []
        for token in made:
            text.push(token)
        end["position"] = len(ids) + len(made) - 1 if made else len(ids)
        reason: str = options.ended[place] if options.ended else ""
        if not reason and not text.stopped:
            # One text is a part a token: the pipeline may be as far ahead of its reader as this generator, no further.
            first = len(made) + (0 if options.echo else len(ids)) if options.n == 1 else None
            ask = partial(self._lm, request=request, first=first)
            context = await self._context(options, ids, request)
            replay = Replay(ask, task, ids, made, self._suspects, partial(self._status, request), context)
            async with aclosing(replay.parts()) as bodies:
                async for body in bodies:
                    end["position"] = body["position"]
                    yield {**self._named(body), "text": text.push(body["token"])}
                    if text.stopped:
                        break
            reason = replay.ended
        end["text"] = text.flush()
        end["finish_reason"] = "stop" if text.stopped else reason or "length"
        if options.n > 1:
            yield {"token": -1, **end}

    async def _echoed(self, options: Options, ids: list[int], request: Request) -> AsyncGenerator[dict[str, Any], None]:
        """The prompt's tokens as parts; with log-probabilities, where they are asked for, of all but the first."""
        text = Text(self._tokenizer, (), ())
        scored: list[dict[str, Any]] = [{}]
        if (options.logprobs or options.top_logprobs) and len(ids) > 1:
            task = Task(mode="score", states=False, top_logprobs=options.top_logprobs)
            async with self._lm(wire(task), ids, request) as stream:
                async for part in stream:
                    log_p, *top = [tensor.numpy().tolist() for tensor in part.tensors]
                    scored += [{"logprob": value} for value in log_p]
                    if top:
                        for entry, *pairs in zip(scored[-len(log_p) :], *top, strict=True):
                            entry["top_logprobs"] = list(zip(*pairs, strict=True))
        for position, token in enumerate(ids):
            known = scored[position] if position < len(scored) else {}
            shown = text.push(token) + (text.flush() if position == len(ids) - 1 else "")
            yield {"token": token, "position": position, "text": shown, "echo": True, **self._named(known)}

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        """A part whose alternatives have their text."""
        if "top_logprobs" not in body:
            return body
        tokenizer = self._tokenizer
        top = [
            (token, value, tokenizer.decode([token], skip_special_tokens=False) if tokenizer is not None else "")
            for token, value in body["top_logprobs"]
        ]
        return {**body, "top_logprobs": top}

    async def _context(self, options: Options, ids: list[int], request: Request) -> Framing | None:
        """What puts passages before the prompt, or before an encoder, where they are asked for."""
        if self._start is not None:
            return self._chunks(options, ids, self._start, request)
        if options.retrieve is None or options.policy != "context":
            return None
        tokenizer = self._needed("to put passages before the prompt")
        room = await self._room(request)
        tokens, most = options.query_tokens, options.max_tokens
        strides = Strides(options.stride, tokens, options.template, most, room, options.passages)
        return Context(self._passages(options.retrieve, options, request), strides, tokenizer, ids)

    def _passages(self, index: str, options: Options, request: Request) -> Passages:
        chosen = index, options.k, options.nprobe, f"embed:{self._model}"
        state, left = partial(self._state, request=request), partial(self._left, request)
        return Passages(self.host.client, *chosen, state, left, request.wait)

    def _chunks(self, options: Options, ids: list[int], start: int, request: Request) -> Chunks:
        """What an encoder-decoder reads beside its own tokens."""
        interval = options.interval if "interval" in options.model_fields_set else INTERVAL
        most, shown = options.max_tokens, options.passages
        reading = Reading(options.chunks, interval, options.query_tokens, most, start, shown)
        client, left = self.host.client, partial(self._left, request)
        encode = partial(encoded, client, self._model, left=left, parent=request.id, wait=request.wait)
        if options.retrieve is None:
            return Chunks(encode, None, reading, None, ids)
        tokenizer = self._needed("to retrieve for what was generated")
        return Chunks(encode, self._passages(options.retrieve, options, request), reading, tokenizer, ids)

    async def _room(self, request: Request) -> int:
        """Tokens that the model reads at most, as its stages say."""
        if not self._length:
            stream = self._lm({"mode": "score", "states": False}, [0, 0], request)
            async for _ in stream:
                pass
            self._length = stream.final.body["context"] if stream.final is not None else 0
        return self._length

    def _lm(
        self,
        body: dict[str, Any],
        ids: Sequence[int],
        request: Request,
        there: bool = False,
        again: bool = False,
        first: int | None = None,
        context: int = 0,
        states: Any = None,
    ) -> Stream:
        """A request to the pipeline on behalf of one that came here.

        Args:
            there: its stages have answered, and may be away for a while.
            again: what they had answered was lost with them.
            first: ids before the first part of the answer, if each part is one of what the pipeline gives: then the
                credit of the answer's reader, less what was sent, is that of the pipeline.
            context: so many ids more, which are not the reader's.
            states: what an encoder-decoder attends to, float32 [n, d].
        """
        left = self._left(request)
        if again:
            self._replayed += len(ids)

        def credit() -> int:
            return max(1, request.until - (len(ids) - context - (first or 0))) if request.until else 0

        stream = self.host.client.stream(
            f"lm:{self._model}",
            body,
            tensors=[np.asarray(ids, np.int32)] + ([] if states is None else [states]),
            deadline=left,
            parent=request.id,
            priority=request.priority,
            retries=RETRIES,
            wait_service=left if there else request.wait,
            credit=None if first is None else credit,
        )
        if first is not None:
            request.granted = stream.granted
        return stream

    async def _status(self, request: Request) -> dict[str, Any]:
        return await self.host.client.status(deadline=self._left(request))

    async def _embed(self, request: Request) -> Answer:
        """Texts to vectors [texts, d]: the hidden state of each text's last token at the last layer's FFN input."""
        texts = request.body.get("texts")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise Refused("texts: give a list of texts that are not empty")
        if len(texts) > MAX_TEXTS:
            raise Refused(f"texts: {len(texts)} of them are too many; give at most {MAX_TEXTS} at once")
        tokenizer = self._needed("to embed text")
        ids = [tokenizer.encode(text).ids for text in texts]
        if not all(ids):
            raise Refused("texts: one of them has no token")
        turn = asyncio.Semaphore(EMBEDDED)

        async def state(row: Sequence[int]) -> Any:
            async with turn:
                return await self._state(row, request)

        tasks = [asyncio.ensure_future(state(row)) for row in ids]
        try:
            return {"model": self._model}, [np.stack(await asyncio.gather(*tasks))]
        finally:
            for task in tasks:  # where one has failed
                task.cancel()

    async def _state(self, ids: Sequence[int], request: Request) -> Any:
        """A score computes states of all tokens but the last, so one more is appended, whichever it is."""
        stream = self._lm({"mode": "score"}, [*ids, 0], request)
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
            if int(given.min()) < 0 or int(given.max()) > MAX_TOKEN_ID:
                raise Refused("the prompt has ids that no vocabulary holds: give those of the model's tokenizer")
            return [int(token) for token in given]
        special = self._start is None  # an encoder-decoder's end token belongs behind what its encoder reads
        ids: list[int] = self._needed("for a prompt of text").encode(options.prompt, add_special_tokens=special).ids
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


async def _alone(
    source: AsyncGenerator[dict[str, Any], None],
) -> AsyncGenerator[tuple[int, dict[str, Any]], None]:
    """One stream as `merged` gives several, without a task of its own."""
    async with aclosing(source):
        async for part in source:
            yield 0, part


def _identity(tokenizer: Path) -> str:
    """Equal for generators that turn the same text into the same ids of the same model."""
    digest = hashlib.sha256()
    for path in (tokenizer.with_name("config.json"), tokenizer):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return f"generator {digest.hexdigest()[:16]}"
