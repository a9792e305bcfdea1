"""What the demo reads: documents to index, documents held out, documents of another topic. Knows no cluster."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..workers.datastore.sources import Document, SourceError, read_documents
from . import corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FEWEST = 2_000  # tokens of a folder: with fewer, what is held out measures nothing
LONGEST_PART = 8_000  # characters
ASKED = "numpy.interp"  # the document that the prompt begins, where it is there
PROMPT_LENGTH = 240  # characters


@dataclass(frozen=True, slots=True)
class Texts:
    """One demo's documents; those of one group (a function and the method of its name) are on one side.

    Attributes:
        index: name of the index, as in `search:<index>`.
        title: what the documents are, for the reader.
        store: to be indexed, as many as the limit allows; may hold more tokens than were asked for.
        development: held out, to choose lambda and temperature on.
        held_out: held out, to measure on.
        other: of another topic.
        asked: an indexed document, in words.
        prompt: its beginning, which the generations go on from.
    """

    index: str
    title: str
    store: tuple[Document, ...]
    development: tuple[Document, ...]
    held_out: tuple[Document, ...]
    other: tuple[Document, ...]
    asked: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Shares:
    """How many tokens at most: indexed, for development, held out."""

    store: int
    development: int
    held_out: int


def numpy_texts(tokenizer: Tokenizer, shares: Shares) -> Texts:
    """numpy's docstrings, against Python's language reference. Raises SourceError where one is missing."""
    try:
        documents = [Document(found.name, found.text) for found in corpus.numpy_documents()]
    except corpus.CorpusError as error:
        raise SourceError(str(error)) from None
    sides = _sides(documents, lambda name: name.rpartition(".")[2], tokenizer, shares)
    asked = next((document for document in sides[0] if document.name == ASKED), sides[0][0])
    return Texts(
        "numpy",
        "numpy's docstrings",
        *sides,
        language_reference(),
        f"{asked.name}, which the model was not trained on",
        opening(asked.text),
    )


def folder_texts(folder: Path, tokenizer: Tokenizer, shares: Shares) -> Texts:
    """The .txt, .md, .rst and .py files of a folder, long ones in parts, against Python's language reference.

    Raises SourceError for no folder, or one with too little text.
    """
    if folder.exists() and not folder.is_dir():
        raise SourceError(f"{folder}: is no folder; name one that holds .txt, .md, .rst or .py files")
    documents = list(_parts(read_documents([folder]).documents))
    tokens = sum(_lengths(documents, tokenizer, FEWEST))
    if tokens < FEWEST:
        raise SourceError(f"{folder}: holds {tokens} tokens of text, the demo needs {FEWEST}; name one with more text")
    sides = _sides(documents, lambda name: name, tokenizer, shares)
    asked = max(sides[0][:8], key=lambda document: len(document.text))
    title = f"the texts of {folder.resolve().name or folder}"
    return Texts("folder", title, *sides, language_reference(), asked.name, opening(asked.text))


def opening(text: str) -> str:
    """The beginning of a text: up to the list of parameters that a docstring has, else about 240 characters."""
    underlined = text.find("Parameters\n----------\n")
    if 0 < underlined < 2 * PROMPT_LENGTH:
        return text[: underlined + len("Parameters\n----------\n")]
    size = min(PROMPT_LENGTH, len(text) // 2)
    return text[: max(text.rfind(" ", 0, size), text.rfind("\n", 0, size)) + 1].rstrip() or text[:size]


def language_reference() -> tuple[Document, ...]:
    """`pydoc`'s topics. Raises SourceError where this Python lacks them."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise SourceError("this Python lacks pydoc_data.topics; use a complete build of CPython") from None
    return tuple(Document(f"topics/{name}", text.strip() + "\n") for name, text in sorted(topics.items()))


def _sides(
    documents: Sequence[Document], group_of: Callable[[str], str], tokenizer: Tokenizer, shares: Shares
) -> tuple[tuple[Document, ...], tuple[Document, ...], tuple[Document, ...]]:
    """(store, development, held out), each in the order of a hash of the groups: all are samples of one whole.

    What repeats the text of another group is held out last. Of a small whole development gets a tenth, what is held
    out a fifth.
    """
    order = sorted(documents, key=lambda document: (_digest(group_of(document.name)), document.name))
    lengths = _lengths(order, tokenizer, 2 * (shares.store + shares.development + shares.held_out))
    groups: dict[str, list[int]] = {}
    for number, document in enumerate(order[: len(lengths)]):
        groups.setdefault(group_of(document.name), []).append(number)
    repeating = _repeating({group: [order[number].text for number in found] for group, found in groups.items()})
    wanted = [min(shares.development, sum(lengths) // 10), min(shares.held_out, sum(lengths) // 5)]
    side_of = [0] * len(lengths)
    for group in sorted(groups, key=lambda group: group in repeating):
        side = next((side for side, tokens in enumerate(wanted, 1) if tokens > 0), 0)
        for number in groups[group] if side else ():
            side_of[number] = side
            wanted[side - 1] -= lengths[number]
    sides = [tuple(order[number] for number, found in enumerate(side_of) if found == side) for side in range(3)]
    if not all(sides):
        raise SourceError("the texts are too few to hold some of them out; name a folder with more files or more text")
    return sides[0], sides[1], sides[2]


def _repeating(groups: dict[str, list[str]]) -> set[str]:
    """The groups of which over a quarter of all sequences of eight words occur in another group, too.

    Held out, they would show how well the index finds a copy.
    """
    sequences = {group: [found for text in texts for found in _sequences(text)] for group, texts in groups.items()}
    owner: dict[int, str] = {}
    shared: set[int] = set()
    for group, found in sequences.items():
        shared.update(sequence for sequence in found if owner.setdefault(sequence, group) != group)
    return {group for group, found in sequences.items() if len(shared.intersection(found)) * 4 > len(set(found))}


def _sequences(text: str) -> list[int]:
    """Hashes of each eight words that follow one another."""
    words = text.split()
    return [hash(tuple(words[begin : begin + 8])) for begin in range(len(words) - 7)]


def _digest(group: str) -> bytes:
    return hashlib.sha256(group.encode()).digest()


def _lengths(documents: Sequence[Document], tokenizer: Tokenizer, enough: int) -> list[int]:
    """Tokens of the first documents, until they are `enough` together."""
    lengths: list[int] = []
    total = 0
    for document in documents:
        if total >= enough:
            break
        lengths.append(len(tokenizer.encode(document.text, add_special_tokens=False).ids))
        total += lengths[-1]
    return lengths


def _parts(documents: Sequence[Document]) -> Iterator[Document]:
    """Long documents cut at paragraphs, else at lines, so that a folder of few files can be held out in part."""
    whole = sum(len(document.text) for document in documents)
    longest = max(400, min(LONGEST_PART, whole // 30))
    for document in documents:
        if len(document.text) <= longest:
            yield document
            continue
        begin, number = 0, 0
        while begin < len(document.text):
            end = _cut(document.text, begin, longest)
            number += 1
            if (part := document.text[begin:end]).strip():
                yield Document(f"{document.name}, part {number}", part.strip("\n") + "\n")
            begin = end


def _cut(text: str, begin: int, longest: int) -> int:
    """Where the part that starts at `begin` ends: behind a paragraph or a line in its second half, if there is one."""
    if len(text) - begin <= longest:
        return len(text)
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, begin + longest // 2, begin + longest)
        if place >= 0:
            return place + len(mark)
    return begin + longest
