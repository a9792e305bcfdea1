"""`ralmq generate --prompts FILE`: prompts from a file, answers as lines of JSON. Knows the file's form, no message."""

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..schema.errors import RalmqError, Refused
from ..schema.limits import MAX_TOKEN_ID, NO_ID
from .collected import collected
from .shared import print_json

RETRIES: Final = 1 << 30  # after Busy: until the deadline


@dataclass(frozen=True, slots=True)
class Prompt:
    """One entry of the file: text or token ids, and its options."""

    prompt: str | list[int]
    options: dict[str, Any]


def read_prompts(name: str, options: dict[str, Any]) -> list[Prompt]:
    """The prompts of a file, `-` for stdin, all checked; `options` hold for each that does not say otherwise.

    A name that ends in .jsonl, or a stdin that begins with a brace, has one JSON object a line, with `prompt` and any
    option of `client.generate`; everything else is text, a prompt a paragraph.

    Raises:
        Refused: the file cannot be read, holds no prompt, or a line of it is broken; the line is named.
    """
    try:
        text = _text(sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or "it is not UTF-8"
        raise Refused(f"{name}: cannot be read ({said}): name a text file or a .jsonl file") from None
    lines = name.endswith(".jsonl") or (name == "-" and text.lstrip().startswith("{"))
    found = [
        _checked(prompt, {**options, **own}, f"{name}: line {number}")
        for number, prompt, own in (_objects(name, text) if lines else _paragraphs(text))
    ]
    if not found:
        raise Refused(f"{name}: holds no prompt: write one a paragraph, or one JSON object a line in a .jsonl file")
    return found


def _text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark, whatever ends its lines."""
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _paragraphs(text: str) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    for match in re.finditer(r"\S.*(?:\n.*\S.*)*", text):
        yield text.count("\n", 0, match.start()) + 1, match.group().rstrip(), {}


def _objects(name: str, text: str) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{name}: line {number}: no JSON ({error}): write one object a line") from None
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise Refused(f'{name}: line {number}: no object with a "prompt": write {{"prompt": "Once"}}')
        yield number, entry.pop("prompt"), entry


def _checked(prompt: Any, options: dict[str, Any], where: str) -> Prompt:
    """A prompt whose options the generator will take, as far as can be told here."""
    from ..client.generation import generation_request
    from ..schema.codec import encode
    from ..schema.message import Request
    from ..workers.generator.options import Options

    ids = isinstance(prompt, list) and all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise Refused(f"{where}: the prompt is neither text nor a list of token ids: give either, not empty")
    try:
        body, tensors = generation_request(prompt, options)
        Options.of(body)
        encode(Request("generate", body=body, tensors=tensors), id=NO_ID)  # what cannot travel is refused here, too
    except (TypeError, ValueError) as error:
        raise Refused(f"{where}: {error}") from None
    except Refused as error:
        raise Refused(f"{where}: {error.message}") from None
    return Prompt(prompt, options)


async def answer(url: str, model: str, prompts: list[Prompt], concurrency: int, deadline: float) -> int:
    """Generates for all, so many at a time; each answer is a line on stdout as it comes. Returns how many failed."""
    from ..client.client import connect

    waiting = iter(enumerate(prompts))
    done = failed = 0

    async with connect(url) as client:

        async def work() -> None:
            nonlocal done, failed
            for index, entry in waiting:
                try:
                    generation = client.generate(
                        entry.prompt, model=model, deadline=deadline, retries=RETRIES, **entry.options
                    )
                    document = await collected(generation, entry.options)
                except RalmqError as error:
                    failed += 1
                    document = {"error": str(error)}
                done += 1
                print_json({"index": index, **document})
                print(f"{done} of {len(prompts)} done, {failed} failed", file=sys.stderr, flush=True)

        await asyncio.gather(*[work() for _ in range(min(concurrency, len(prompts)))])
    return failed
