"""A finished generation as one plain document, and its text shown as it comes. Knows tokens, no command."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..client.generation import Generation
    from ..client.results import Token


async def collected(generation: "Generation", options: dict[str, Any], *, show: bool = False) -> dict[str, Any]:
    """Reads a generation to its end: text, tokens, finish_reason, usage, and what else `options` asked for.

    With n > 1 these are the first text's, and `choices` holds each. `show` writes the text to stdout meanwhile, or
    at the end where there are several.
    """
    choices = [_Choice() for _ in range(int(options.get("n") or 1))]
    async for token in generation:
        choices[token.index].add(token)
        if show and len(choices) == 1:
            typer.echo(token.text, nl=False)
    for index, choice in enumerate(choices):
        if show:
            typer.echo("" if len(choices) == 1 else f"[{index}]\n{''.join(choice.texts)}")
    documents = [
        {**choice.document(options), "finish_reason": generation.finish_reasons.get(index, "")}
        for index, choice in enumerate(choices)
    ]
    document = {**documents[0], "usage": generation.usage}
    if len(choices) > 1:
        document["choices"] = [{"index": index, **each} for index, each in enumerate(documents)]
    return document


class _Choice:
    """The tokens of one text."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._tokens: list[Token] = []

    def add(self, token: "Token") -> None:
        """The next one."""
        self.texts.append(token.text)
        if token.id >= 0:
            self._tokens.append(token)

    def document(self, options: dict[str, Any]) -> dict[str, Any]:
        """Text and tokens, and the lists that go with the tokens where asked for."""
        document: dict[str, Any] = {"text": "".join(self.texts), "tokens": [token.id for token in self._tokens]}
        if options.get("logprobs") or options.get("top_logprobs"):
            document["logprobs"] = [token.logprob for token in self._tokens]
        if options.get("top_logprobs"):
            document["top_logprobs"] = [[entry._asdict() for entry in token.top_logprobs] for token in self._tokens]
        if options.get("passages"):
            document["passages"] = [
                {"position": token.position, "passages": list(token.passages)}
                for token in self._tokens
                if token.passages
            ]
        return document
