"""The asking side of `generate:<model>`: options in, tokens out. Knows the body's fields, no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import numpy as np

from .results import Alternative, Token
from .stream import Stream

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
    "seed": None,  # None: drawn by the generator, and told in the usage
    "n": 1,  # so many texts; tokens say which by their index
    "stop": (),  # strings that end the text; they are not part of it
    "stop_ids": (),  # token ids that end the text
    "ignore_eos": False,
    "logprobs": False,
    "top_logprobs": 0,  # and those of so many of the most probable tokens, 20 at most
    "echo": False,  # the prompt's tokens first
    "hooks": {},  # parameters of each logits hook of the stages that is to be used
    "retrieve": None,  # name of an index
    "policy": "knn",
    "interval": 1,  # a retrieval each so many tokens
    "staleness": 0,  # use the answer to the query of so many positions ago
    "k": 8,
    "nprobe": None,
    "knn_lambda": 0.25,
    "knn_temperature": 10.0,
    "passages": False,  # give what was retrieved along with the tokens
}


def generation_request(prompt: str | Sequence[int], options: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Body and tensors of the request; token ids travel as an int32 tensor.

    Raises:
        TypeError: an option that does not exist.
    """
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"generate() has no option {name!r}: there are {', '.join(DEFAULTS)}")
    body = {name: value for name, value in options.items() if value is not None}
    if isinstance(bias := body.get("logit_bias"), Mapping):
        body["logit_bias"] = [[int(token), float(value)] for token, value in bias.items()]  # maps have text keys
    if isinstance(prompt, str):
        return {**body, "prompt": prompt}, []
    return body, [np.asarray(prompt, dtype=np.int32)]


class Generation:
    """Tokens as they are generated. Leaving the loop early cancels the generation on every worker.

    Attributes (after the end):
        finish_reason: "stop" (end of text, or a stop string) or "length".
        finish_reasons: the same of each of the n texts.
        usage: prompt_tokens, completion_tokens, and the seed that was used; with n > 1 the seeds of each text.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
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
                return self._end()
            index = body.get("index", 0)
            if "finish_reason" in body:  # the end of one of several
                self.finish_reasons[index] = body["finish_reason"]
            if body["token"] >= 0 or body["text"]:
                return Token(
                    body["text"],
                    body["token"],
                    body["position"],
                    body.get("logprob"),
                    tuple(body.get("passages", ())),
                    tuple(Alternative(*entry) for entry in body.get("top_logprobs", ())),
                    index,
                )

    async def aclose(self) -> None:
        """Gives the generation up where it has not ended."""
        await self._stream.aclose()

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
