"""Which files of what a user names become documents."""

from pathlib import Path

import pytest
from ralmq.workers.datastore.sources import SourceError, read_documents


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    books = tmp_path / "books"
    for name in ("b.md", "a.txt", "sub/c.py", "sub/d.rst", ".hidden/x.txt", "__pycache__/y.py", "sub/.z.txt", "e.bin"):
        (books / name).parent.mkdir(parents=True, exist_ok=True)
        (books / name).write_text(f"text of {name}")
    (books / "empty.txt").write_text(" \n")
    (books / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "one.txt").write_text("ünï\n")
    documents, skipped = read_documents([books, tmp_path / "one.txt"])
    assert [(document.name, document.text) for document in documents] == [
        ("books/a.txt", "text of a.txt"),
        ("books/b.md", "text of b.md"),
        ("books/sub/c.py", "text of sub/c.py"),
        ("books/sub/d.rst", "text of sub/d.rst"),
        ("one.txt", "ünï\n"),
    ]
    assert skipped == ["books/latin.txt"]


def test_sources_that_give_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "good.txt").write_text("good")
    for name, said in (
        ("none", "no such file or folder"),
        ("empty", "holds no readable"),
        ("picture.png", "is no .md"),
        ("latin.txt", "holds no readable"),
    ):
        with pytest.raises(SourceError, match=said) as caught:
            read_documents([tmp_path / "good.txt", tmp_path / name])
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="name at least one"):
        read_documents([])


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(read_documents([tmp_path]).documents) == 1
