"""Token ids to text as they come: incremental detokenizing and stop strings. Knows no message."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from ...schema.errors import Refused

CONTEXT = 8  # tokens before the next one that its text may depend on
LONGEST = 4 * CONTEXT  # tokens that are decoded at a time
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character


class Detokenizer:
    """Text of a growing sequence; a character of several tokens appears with the last of them.

    The last few tokens are decoded together each time, since what one adds (a space, an accent) depends on those
    before it. Bytes that are no whole character yet decode to U+FFFD, at most three of them at the end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = self._recent(list(prompt))
        self._given = self._decode(self._ids)

    def push(self, token: int) -> str:
        """What this token adds to the text; empty where a character is not complete yet."""
        self._ids.append(token)
        whole = self._decode(self._ids)
        text = _settled(whole)
        full = len(self._ids) > LONGEST and (text == whole or len(self._ids) > 2 * LONGEST)
        if whole.endswith(UNKNOWN) and not text.startswith(self._given) and not full:
            return ""  # some tokenizers show all of a run of bytes as broken while its last character is open
        new = _behind(self._given, text)
        if new:
            self._given = text
        if full:
            self._ids = self._recent(self._ids)
            self._given = _settled(self._decode(self._ids))
        return new

    def flush(self) -> str:
        """What the last tokens give although a character of theirs was never completed."""
        text = self._decode(self._ids)
        new, self._given = _behind(self._given, text), text
        return new

    def _recent(self, ids: list[int]) -> list[int]:
        """The last tokens, from the beginning of a character on."""
        for size in range(CONTEXT, CONTEXT + 4):
            if not self._decode(ids[-size:]).startswith(UNKNOWN):
                return ids[-size:]
        return ids[-CONTEXT:]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _behind(given: str, text: str) -> str:
    """The part of a text that differs from, or follows, what was given."""
    if text.startswith(given):
        return text[len(given) :]
    same = (place for place, pair in enumerate(zip(given, text, strict=False)) if pair[0] != pair[1])
    return text[next(same, len(text)) :]


def _settled(text: str) -> str:
    """A text without the end that may still become another character."""
    end = len(text)
    while end > max(0, len(text) - 3) and text[end - 1] == UNKNOWN:
        end -= 1
    return text[:end]


class Stops:
    """Finds stop strings in a text that comes in pieces; what may be the beginning of one is held back.

    The one that is complete first ends the text, the longest of them where several are: how the text was cut into
    pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._free = 0  # characters at the beginning of what is held within which none ends
        self.found = False

    def push(self, text: str, free: bool = False) -> str:
        """The text that may be given away now; after a stop string, `found`, nothing more comes.

        One that ends within a `free` text counts for nothing; it may begin there.
        """
        if self.found:
            return ""
        self._held += text
        if free:
            self._free = len(self._held)
        places = [(place + len(stop), place) for stop in self._stops if (place := self._place(stop)) >= 0]
        self.found = bool(places)
        end = min(places)[1] if places else len(self._held) - max(map(self._beginning, self._stops), default=0)
        given, self._held = self._held[:end], "" if self.found else self._held[end:]
        self._free = max(0, self._free - end)
        return given

    def flush(self) -> str:
        """What was held back, once it is certain that no stop string follows."""
        given, self._held = self._held, ""
        return given

    def _place(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._free - len(stop) + 1))

    def _beginning(self, stop: str) -> int:
        """How many characters at the end of what is held may begin this stop string."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0


class Text:
    """The text of one generation as it grows; empty without a tokenizer.

    No stop string that is complete within the first `min_tokens` tokens counts.

    Raises:
        Refused: stop strings, and no tokenizer to find them with.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str], min_tokens: int = 0
    ) -> None:
        if tokenizer is None and stops:
            raise Refused("stop strings need the model's tokenizer.json: add it, or leave stop out")
        self._detokenizer = Detokenizer(tokenizer, prompt) if tokenizer is not None else None
        self._stops = Stops(stops)
        self._free = min_tokens  # tokens to come whose text no stop string ends

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self._stops.found

    def push(self, token: int) -> str:
        """What may be given away once this token is known."""
        if self._detokenizer is None:
            return ""
        free, self._free = self._free > 0, max(0, self._free - 1)
        return self._stops.push(self._detokenizer.push(token), free)

    def flush(self) -> str:
        """What was held back; it, too, ends at a stop string."""
        if self._detokenizer is None or self.stopped:
            return ""
        tail = self._stops.push(self._detokenizer.flush())
        return tail + self._stops.flush()
