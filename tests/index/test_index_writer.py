"""Index directories appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from ralmq.workers.index import directory, writer
from ralmq.workers.index.directory import OutputError, replacing
from ralmq.workers.index.factory import default_factory
from ralmq.workers.index.manifest import FILES, read_manifest
from ralmq.workers.index.store import open_index
from ralmq.workers.index.stream import TokenStream
from tokenizers import Tokenizer

Build = Callable[..., Path]


class Crash(BaseException):
    """Stands for Ctrl-C: no `except Exception` may swallow it."""


def crash(*_: Any, **__: Any) -> None:
    raise Crash


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STEPS = [
    (writer.faiss, "write_index"),
    (writer, "_save"),
    (writer, "record_file"),
    (writer, "write_manifest"),
    (directory, "sync"),
    (directory, "_swap"),
]


@pytest.mark.parametrize(("module", "step"), STEPS)
@pytest.mark.parametrize("old", [True, False])
def test_a_crash_at_any_step_changes_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, step: str, old: bool
) -> None:
    if old:
        build()
    before = contents(tmp_path)
    monkeypatch.setattr(module, step, crash)
    with pytest.raises(Crash):
        build(fingerprint="new")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["docs"] if old else [])
    build(fingerprint="new")
    assert open_index(tmp_path / "docs").manifest.fingerprint == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_puts_the_old_one_back(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    build()
    before, calls, real = contents(tmp_path), [], os.rename

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise Crash
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Crash):
        build(fingerprint="new")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_an_old_index_is_replaced_whole(build: Build, tmp_path: Path) -> None:
    opened = open_index(build())
    build(fingerprint="new")
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
    assert open_index(tmp_path / "docs").manifest.fingerprint == "new"
    assert opened.following(np.array([0])).tolist() == [[101, 102, 103, 104, 105, 106, -1, -1]]  # still mapped


def test_an_index_with_a_tokenizer_is_replaced_by_one_without(build: Build, words: Tokenizer) -> None:
    index = build(tokenizer=words.to_str())
    assert (index / "tokenizer.json").read_text() == words.to_str()
    build()
    assert not (index / "tokenizer.json").exists() and read_manifest(index).files.keys() == set(FILES)


def test_a_file_of_the_user_is_never_deleted(build: Build, tmp_path: Path) -> None:
    index = build()
    (index / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds files that are no part of an index \(notes.txt\); choose another"):
        build()
    assert (index / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(index)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="is not a plain directory"):
            build(name)


def test_missing_parents_are_made_and_an_empty_directory_is_used(tmp_path: Path) -> None:
    for out in (tmp_path / "a/b/c", tmp_path):
        if out == tmp_path:
            out = tmp_path / "empty"
            out.mkdir()
        with replacing(out, ["x"]) as fresh:
            (fresh / "x").write_text("1")
        assert [path.name for path in out.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "two words"}, "an index name is"),
        ({"name": ""}, "an index name is"),
        ({"vectors": np.zeros((17, 4))}, "vectors are float64"),
        ({"vectors": np.zeros((0, 4), np.float32)}, r"vectors are float32 \[0, 4\]"),
        ({"vectors": np.zeros((17, 0), np.float32)}, r"vectors are float32 \[17, 0\]"),
        ({"vectors": np.zeros(17, np.float32)}, r"vectors are float32 \[17\]"),
        ({"vectors": np.full((17, 4), np.nan, np.float32)}, "hold NaN or infinity"),
        ({"entries": np.arange(16)}, "entries are"),
        ({"entries": np.arange(17, dtype=np.int32)}, "entries are int32"),
        ({"entries": np.arange(4, 21)}, "entries leave the stream of 20 tokens"),
        ({"entries": np.arange(-1, 16)}, "entries leave the stream"),
        ({"factory": "Nonsense"}, "no such index is served; give Flat, IVF"),
        ({"factory": "HNSW8,SQ8"}, "no such index is served"),
        ({"factory": "IVF18,Flat"}, "18 lists for 17 vectors"),
        ({"factory": "IVF2,PQ3"}, "4 dimensions are no multiple of 3"),
        ({"factory": "IVF2,PQ2"}, "needs 256 vectors to train its codes, 17 came"),
        ({"shards": 0}, "0 shards for 17 vectors"),
        ({"shards": 18}, "18 shards for 17 vectors"),
        ({"shards": 2, "by": "list"}, "has no lists to spread by"),
        ({"shards": 3, "by": "list", "factory": "IVF2,Flat"}, "2 lists for 3 shards"),
    ],
)
def test_what_cannot_be_an_index(build: Build, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(OutputError, match=said) as caught:
        build("docs", **changed)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_kind_of_index_follows_its_size() -> None:
    assert [default_factory(count) for count in (1, 19_999, 20_000, 250_000)] == [
        "Flat",
        "Flat",
        "IVF141,Flat",
        "IVF500,Flat",
    ]


@pytest.mark.parametrize("lists", [10, 60])  # trained on a sample, and on all
def test_the_seed_fixes_the_index(build: Build, lists: int) -> None:
    vectors = np.random.default_rng(3).normal(size=(2000, 4)).astype(np.float32)
    stream = TokenStream(np.zeros(2001, np.int32), ("a",), np.array([0]))
    given = {"vectors": vectors, "stream": stream, "entries": stream.entries(), "factory": f"IVF{lists},Flat"}
    files = [contents(build(f"n{place}", **given, seed=seed))["index.faiss"] for place, seed in enumerate((1, 1, 2))]
    assert files[0] == files[1] != files[2]


def test_progress_ends_at_the_total(build: Build) -> None:
    told: list[tuple[str, int, int]] = []
    build(factory="IVF2,Flat", progress=lambda *step: told.append(step))
    assert told == [("train", 0, 1), ("train", 1, 1), ("fill", 17, 17)]


def test_inverted_file_holds_every_vector(build: Build) -> None:
    index = faiss.read_index(str(build(factory="IVF3,Flat") / "index.faiss"))
    assert sum(index.invlists.list_size(number) for number in range(3)) == index.ntotal == 17
