"""Token ids to text as they come: incremental detokenizing and stop strings. Knows no message."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of a growing sequence; a character of several tokens appears with the last of them."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-8:]), skip_special_tokens=True)
        self._open: list[int] = []

    def push(self, token: int) -> str:
        """What this token adds to the text; empty where a character is not complete yet."""
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is None:
            self._open.append(token)
            return ""
        self._open.clear()
        return text

    def flush(self) -> str:
        """What the last tokens give although a character of theirs was never completed."""
        text: str = self._tokenizer.decode(self._open, skip_special_tokens=True) if self._open else ""
        self._open.clear()
        return text


class Stops:
    """Finds stop strings in a text that comes in pieces; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be given away now; after a stop string, `found`, nothing more comes."""
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max(self._beginning(stop) for stop in self._stops)
        free = len(self._held) - keep
        given, self._held = self._held[:free], self._held[free:]
        return given

    def flush(self) -> str:
        """What was held back, once it is certain that no stop string follows."""
        given, self._held = ("" if self.found else self._held), ""
        return given

    def _beginning(self, stop: str) -> int:
        """How many characters at the end of what is held may begin this stop string."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
