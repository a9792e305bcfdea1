"""Passages before a prompt, retrieved anew each stride. Knows texts and tokens; no pipeline, and no index but by name.

In-context retrieval (Ram et al. 2023, "In-Context Retrieval-Augmented Language Models"): the model is left as it is,
and reads what was found before what it goes on with.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tokenizers import Tokenizer

from ...schema.errors import Refused

PASSAGES: Final = "{passages}"
PROMPT: Final = "{prompt}"
TEMPLATE: Final = f"{PASSAGES}\n\n{PROMPT}"
BETWEEN: Final = "\n\n"  # passages

Find = Callable[[Sequence[int], str], Awaitable[list[dict[str, Any]]]]
"""Payloads with `id` and `distance`, best first, for the last tokens of a text, given as ids and as text."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a prompt, as token ids.

    Attributes:
        begin, until: new tokens, counted from the first, that it serves for: from there and up to there.
        last: no other follows.
        start: ids at the prompt's beginning that stay in front of all: special ones, such as the begin of a text.
        passages: those that it holds, where the reader is to see them.
        states: of an encoder-decoder, float32 [n, d]: what its encoder made of them.
    """

    begin: int
    until: int
    last: bool
    start: int = 0
    before: Sequence[int] = ()
    after: Sequence[int] = ()
    passages: list[dict[str, Any]] = field(default_factory=list)
    states: Any = None

    @property
    def size(self) -> int:
        """Tokens of it."""
        return len(self.before) + len(self.after)

    def around(self, prompt: Sequence[int]) -> list[int]:
        """The prompt in its frame."""
        return [*prompt[: self.start], *self.before, *prompt[self.start :], *self.after]


class Framing(Protocol):
    """What stands around a prompt while a text grows."""

    async def frame(self, made: Sequence[int]) -> Frame:
        """The frame in which the next token is generated."""
        ...


@dataclass(frozen=True, slots=True)
class Strides:
    """How passages are asked for and shown.

    Attributes:
        stride: new tokens after which they are retrieved anew.
        tokens: how many of the last ones, of prompt and output, are the query.
        template: a text with {passages} and, behind it, {prompt}.
        most: new tokens in all.
        room: tokens that the model reads at most.
        shown: the reader is to see the passages.
    """

    stride: int
    tokens: int
    template: str
    most: int
    room: int
    shown: bool


class Context:
    """The frames of one text; within a stride it stays the same, so that a replay reads what was read before."""

    def __init__(self, find: Find, strides: Strides, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._find = find
        self._strides = strides
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._begin = -1
        self._frame = Frame(0, 0, False)
        special = tokenizer.encode("").ids
        self._start = 0
        while self._start < min(len(special), len(prompt) - 1) and special[self._start] == prompt[self._start]:
            self._start += 1

    async def frame(self, made: Sequence[int]) -> Frame:
        """The frame in which the next token is generated.

        Raises:
            Refused: what was found holds no text.
            RalmqError: as the index answers.
        """
        begin = len(made) - len(made) % self._strides.stride
        if begin != self._begin:
            self._frame = await self._framed(made[:begin])
            self._begin = begin
        return self._frame

    async def _framed(self, made: Sequence[int]) -> Frame:
        strides = self._strides
        most = min(strides.most, strides.room - len(self._prompt))
        if most <= 0:  # its stages say what is wrong
            return Frame(len(made), strides.most, True)
        until = min(len(made) + strides.stride, most)
        part = len(made), until, until == most
        head, _, rest = strides.template.partition(PASSAGES)
        between, _, tail = rest.partition(PROMPT)
        after = self._ids(tail)
        room = strides.room - len(self._prompt) - until - len(after)
        if room <= len(self._ids(head)) + len(self._ids(between)):
            return Frame(*part)
        asked = [*self._prompt, *made][-strides.tokens :]
        text = self._tokenizer.decode(asked)
        found = [passage for passage in await self._find(asked, text) if text_of(passage)] if text.strip() else []
        before, count = self._fitting(head, [text_of(passage) for passage in found], between, room)
        return Frame(*part, self._start, before, after, found[:count] if strides.shown else [])

    def _fitting(self, head: str, passages: list[str], between: str, room: int) -> tuple[list[int], int]:
        """What stands before the prompt, so many ids at most, and how many passages it holds; the first may be cut."""
        sizes = [len(self._ids(BETWEEN + passage)) for passage in passages]
        count = next((place for place in range(len(sizes)) if sum(sizes[: place + 1]) > room), len(sizes))
        while count or not passages:
            ids = self._ids(head + BETWEEN.join(passages[:count]) + between)
            if len(ids) <= room or not passages:
                return ids, count
            count -= 1
        first, last = self._ids(head), self._ids(between)
        return [*first, *self._ids(passages[0])[: room - len(first) - len(last)], *last], 1

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return found


def text_of(payload: dict[str, Any]) -> str:
    """The text of a passage: `text`, or both sides of a datastore's entry.

    Raises:
        Refused: it has none.
    """
    parts = [payload["text"]] if "text" in payload else [payload.get("context"), payload.get("continuation")]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise Refused("the index gives no text of its passages: build it with a tokenizer, or with a field `text`")
    return "".join(texts).strip()
