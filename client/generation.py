"""The asking side of `generate:<model>`: options in, tokens out. Knows the body's fields, no tokenizer."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np

from ..schema.errors import Refused, WorkerLost
from ..schema.limits import MAX_TOKEN_ID
from .losses import Losses
from .results import Alternative, Token
from .stream import Stream

MOST_TEXTS = 64

# The options of a generation and what they are where not given; the generator checks their values.
DEFAULTS: Final[dict[str, Any]] = {
    "max_tokens": 64,
    "min_tokens": 0,  # no end of text, stop id or stop string before
    "temperature": 0.0,  # 0: greedy
    "top_k": 0,  # 0: all
    "top_p": 1.0,
    "min_p": 0.0,  # tokens of at least that share of the most probable one; 0: all
    "repetition_penalty": 1.0,  # of tokens of prompt and output; 1: none
    "presence_penalty": 0.0,  # of tokens of the output
    "frequency_penalty": 0.0,  # the same, for each time that they occur
    "logit_bias": {},  # what is added to the logit of a token id
    "seed": None,  # None: drawn here, and told in the usage
    "n": 1,  # so many texts; tokens say which by their index
    "stop": (),  # strings that end the text; they are not part of it
    "stop_ids": (),  # token ids that end the text
    "ignore_eos": False,
    "logprobs": False,
    "top_logprobs": 0,  # and those of so many of the most probable tokens, 20 at most
    "echo": False,  # the prompt's tokens first
    "hooks": {},  # parameters of each logits hook of the stages that is to be used
    "retrieve": None,  # name of an index
    "policy": "knn",  # or "ngram", "knn+ngram", "context", "encdec": see docs/retrieval-policies.md
    "interval": 1,  # a retrieval each so many tokens
    "staleness": 0,  # use the answer to the query of so many positions ago
    "k": 8,
    "nprobe": None,
    "knn_lambda": 0.25,
    "knn_temperature": 10.0,
    "ngram_lambda": 0.25,
    "order": 3,  # tokens of an n-gram
    "stride": 16,  # new tokens after which passages before the prompt are retrieved anew
    "template": None,  # a text with {passages} and, behind it, {prompt}
    "query_tokens": 32,  # the last ones, which passages are retrieved for
    "chunks": None,  # texts, or lists of token ids, that an encoder-decoder is to read instead of retrieving some
    "passages": False,  # give what was retrieved along with the tokens
}


def generation_request(prompt: str | Sequence[int], options: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Body and tensors of the request; token ids travel as an int32 tensor.

    Raises:
        TypeError: an option that does not exist.
        Refused: a prompt or a number of texts that cannot be.
    """
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"generate() has no option {name!r}: there are {', '.join(DEFAULTS)}")
    body = {name: value for name, value in options.items() if value is not None}
    n = body.get("n", 1)
    if type(n) is not int or not 1 <= n <= MOST_TEXTS:
        raise Refused(f"n: {n!r} is out of range, give 1 to {MOST_TEXTS}")
    body.setdefault("seed", random.getrandbits(63))  # the same for whoever goes on with it
    if isinstance(bias := body.get("logit_bias"), Mapping):
        body["logit_bias"] = [[int(token), float(value)] for token, value in bias.items()]  # maps have text keys
    if isinstance(prompt, str):
        return {**body, "prompt": prompt}, []
    return body, [_ids(prompt)]


def _ids(prompt: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The ids of a prompt, int32 [n].

    Raises:
        Refused: something else is among them.
    """
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token <= MAX_TOKEN_ID:
            raise Refused(f"the prompt has {token!r}, which is no token id: give text, or ids of 0 to {MAX_TOKEN_ID}")
    return np.asarray(prompt, dtype=np.int32)


class Generation:
    """Tokens as they are generated. Leaving the loop early cancels the generation on every worker.

    Where the generator is lost, another one goes on from the tokens that are here: the reader sees a pause.

    Args:
        ask: sends the request with these fields added to its body.
        status: asks for what `ralmq status` shows.
        n: texts that are asked for.

    Attributes (after the end):
        finish_reason: "stop" (end of text, or a stop string) or "length".
        finish_reasons: the same of each of the n texts.
        usage: prompt_tokens, completion_tokens, and the seed that was used; with n > 1 the seeds of each text.
    """

    def __init__(
        self, ask: Callable[[dict[str, Any]], Stream], status: Callable[[], Awaitable[dict[str, Any]]], n: int = 1
    ) -> None:
        self._ask = ask
        self._stream = ask({})
        self._made: list[list[int]] = [[] for _ in range(n)]
        self._ended = [""] * n
        self._seen = [-1] * n  # highest position of each text, those of an echoed prompt included
        self._losses = Losses(status)
        self._tail = False
        self.finish_reason = ""
        self.finish_reasons: dict[int, str] = {}
        self.usage: dict[str, Any] = {}

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if self._tail:
            raise StopAsyncIteration
        while True:
            try:
                body = (await self._stream.__anext__()).body
            except StopAsyncIteration:
                if not self._lacks():
                    return self._end()
                await self._again(WorkerLost("its generator ended it without its last token"))
            except WorkerLost as lost:
                await self._again(lost)
            else:
                if self._new(body):
                    return _token(body)

    async def aclose(self) -> None:
        """Gives the generation up where it has not ended."""
        await self._stream.aclose()

    async def _again(self, lost: WorkerLost) -> None:
        await self._losses.add(lost, "its generators were")
        self._stream = self._ask({"made": self._made, "ended": self._ended})

    def _lacks(self) -> bool:
        """Whether more tokens were made than came."""
        final = self._stream.final
        counted = final.body.get("usage", {}).get("completion_tokens", 0) if final is not None else 0
        return bool(sum(map(len, self._made)) < counted)

    def _new(self, body: dict[str, Any]) -> bool:
        """Takes note of a part; False for what the reader has, or need not see."""
        index, token = body.get("index", 0), body["token"]
        if "finish_reason" in body:  # the end of one of several
            known = index in self.finish_reasons
            self.finish_reasons[index] = self._ended[index] = body["finish_reason"]
            return bool(body["text"]) and not known
        if body["position"] <= self._seen[index]:
            return False
        self._seen[index] = body["position"]
        if not body.get("echo"):
            self._losses.clear()
            self._made[index].append(token)
            self._ended[index] = body.get("ended", "")
        return True

    def _end(self) -> Token:
        """Text held back until the end comes as one last token of id -1."""
        self._tail = True
        body = self._stream.final.body if self._stream.final is not None else {}
        self.finish_reason = body.get("finish_reason", "")
        self.finish_reasons = dict(sorted(self.finish_reasons.items())) or {0: self.finish_reason}
        self.usage = body.get("usage", {})
        if body.get("text"):
            return Token(body["text"], -1, body.get("position", -1))
        raise StopAsyncIteration


def _token(body: dict[str, Any]) -> Token:
    return Token(
        body["text"],
        body["token"],
        body["position"],
        body.get("logprob"),
        tuple(body.get("passages", ())),
        tuple(Alternative(*entry) for entry in body.get("top_logprobs", ())),
        body.get("index", 0),
    )
