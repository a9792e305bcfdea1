"""How the demo's documents are divided: what is held out is in no store, and no copy of it either."""

from pathlib import Path

import pytest
from ralmq.demo import texts
from ralmq.demo.texts import Shares, Texts, folder_texts, numpy_texts, opening
from ralmq.workers.datastore.sources import SourceError
from ralmq.workers.models import resolve
from tokenizers import Tokenizer

SHARES = Shares(20_000, 1_500, 3_000)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(resolve("demo")[1] / "tokenizer.json"))


@pytest.fixture(scope="module")
def found(tokenizer: Tokenizer) -> Texts:
    return numpy_texts(tokenizer, SHARES)


def tokens(tokenizer: Tokenizer, documents: tuple[texts.Document, ...]) -> int:
    return sum(len(tokenizer.encode(document.text, add_special_tokens=False).ids) for document in documents)


def test_each_document_and_its_namesakes_are_on_one_side(found: Texts) -> None:
    sides = [{one.name.rpartition(".")[2] for one in side} for side in (found.store, found.development, found.held_out)]
    assert all(sides)
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_the_sides_are_as_large_as_was_asked_for(found: Texts, tokenizer: Tokenizer) -> None:
    assert tokens(tokenizer, found.store) >= SHARES.store
    assert SHARES.development <= tokens(tokenizer, found.development) < 2 * SHARES.development + 2_000
    assert SHARES.held_out <= tokens(tokenizer, found.held_out) < 2 * SHARES.held_out + 2_000


def test_what_is_held_out_repeats_nothing_of_the_store(found: Texts) -> None:
    groups = {"store": [one.text for one in found.store]}
    for document in found.development + found.held_out:
        assert texts._repeating({**groups, document.name: [document.text]}) <= {"store"}


def test_the_division_is_the_same_every_time(found: Texts, tokenizer: Tokenizer) -> None:
    assert numpy_texts(tokenizer, SHARES) == found


def test_the_prompt_begins_an_indexed_document(found: Texts) -> None:
    assert any(one.text.startswith(found.prompt) and found.asked.startswith(one.name) for one in found.store)


def test_a_group_that_copies_another_is_known() -> None:
    words = [f"word{number}" for number in range(40)]
    groups = {"a": [" ".join(words)], "b": [" ".join(words[:30] + ["x"] * 10)], "c": [" ".join(reversed(words))]}
    assert texts._repeating(groups) == {"a", "b"}


def test_long_files_are_cut_without_loss() -> None:
    lines = "\n".join(f"line {number} of a long file" for number in range(2_000))
    parts = list(texts._parts([texts.Document("long.txt", lines), texts.Document("short.txt", "short")]))
    assert [one.name for one in parts[:2]] == ["long.txt, part 1", "long.txt, part 2"]
    assert "".join(one.text for one in parts[:-1]).split() == lines.split()
    assert parts[-1] == texts.Document("short.txt", "short")
    assert max(len(one.text) for one in parts) <= texts.LONGEST_PART + 1


def test_text_without_a_place_to_cut_is_cut_anyway() -> None:
    parts = list(texts._parts([texts.Document("one.txt", "x" * 10_000)]))
    assert "".join(one.text.strip("\n") for one in parts) == "x" * 10_000


@pytest.mark.parametrize("text", ["one two three four five six", "x" * 500, "a\n\nb\n" * 200])
def test_an_opening_is_a_part_of_its_text(text: str) -> None:
    assert opening(text) and text.startswith(opening(text)) and len(opening(text)) < len(text)


def test_a_file_is_no_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "one.txt").write_text("text " * 5_000)
    with pytest.raises(SourceError, match="is no folder"):
        folder_texts(tmp_path / "one.txt", tokenizer, SHARES)
    folder_texts(tmp_path, tokenizer, SHARES)
