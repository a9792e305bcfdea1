"""Every fault of an index directory is one line that names the file and what to do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from ralmq.workers.index.manifest import (
    FILES,
    TOKENIZER,
    ManifestError,
    load_manifest,
    read_manifest,
    record_file,
    write_manifest,
)
from ralmq.workers.index.store import open_index
from tokenizers import Tokenizer

Build = Callable[..., Path]


def change(index: Path, **fields: Any) -> None:
    path = index / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refresh(index: Path) -> None:
    """Makes the manifest name the files as they are now."""
    manifest = load_manifest(index)
    write_manifest(index, replace(manifest, files={name: record_file(index / name) for name in manifest.files}))


def test_round_trip(build: Build) -> None:
    index = build(sources=["books", "notes.md"])
    manifest = read_manifest(index)
    assert (manifest.name, manifest.dimension, manifest.ntotal) == ("docs", 4, 17)
    assert (manifest.metric, manifest.factory, manifest.faiss_version) == ("l2", "Flat", faiss.__version__)
    assert (manifest.model, manifest.fingerprint, manifest.tokens_per_payload) == ("tiny", "abc", 8)
    assert manifest.sources == ("books", "notes.md")
    assert sorted(manifest.files) == sorted(path.name for path in index.iterdir() if path.name != "manifest.json")


def fault(index: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        open_index(index)
    message = str(caught.value)
    assert "\n" not in message and str(index) in message
    assert any(word in message for word in ("build the index again", "name one that", "upgrade"))
    return message


def test_missing_directory(tmp_path: Path) -> None:
    assert "no such index directory" in fault(tmp_path / "none")


@pytest.mark.parametrize("name", ["manifest.json", *FILES, TOKENIZER])
def test_missing_file(build: Build, words: Tokenizer, name: str) -> None:
    index = build(tokenizer=words.to_str())
    (index / name).unlink()
    message = fault(index)
    assert f"{name}: the file is missing" in message


@pytest.mark.parametrize("name", [*FILES, TOKENIZER])
def test_other_size(build: Build, words: Tokenizer, name: str) -> None:
    index = build(tokenizer=words.to_str())
    with (index / name).open("ab") as file:
        file.write(b"x")
    assert f"{name}: " in fault(index) and "bytes where the manifest says" in fault(index)


@pytest.mark.parametrize("name", [*FILES, TOKENIZER])
def test_other_sha256(build: Build, words: Tokenizer, name: str) -> None:
    index = build(tokenizer=words.to_str())
    raw = bytearray((index / name).read_bytes())
    raw[-1] ^= 1
    (index / name).write_bytes(raw)
    assert f"{name}: its sha256 is not the manifest's" in fault(index)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": 2', "\xff"])
def test_bad_json(build: Build, text: str) -> None:
    index = build()
    (index / "manifest.json").write_text(text, encoding="latin-1")
    assert "not valid JSON" in fault(index)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '"format"'])
def test_no_manifest(build: Build, text: str) -> None:
    index = build()
    (index / "manifest.json").write_text(text)
    assert "no 'format' field" in fault(index)


def test_huge_manifest(build: Build) -> None:
    index = build()
    (index / "manifest.json").write_bytes(b" " * (1 << 21))
    assert "so it is no manifest" in fault(index)


@pytest.mark.parametrize("version", [0, 1, 3, "2", [2]])
def test_unknown_format(build: Build, version: Any) -> None:
    index = build()
    change(index, format=version)
    assert f"format {version!r}, this ralmq reads format 2" in fault(index)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dimension": 0}, "dimension is not a positive integer"),
        ({"ntotal": "17"}, "ntotal is not a positive integer"),
        ({"ntotal": True}, "ntotal is not a positive integer"),
        ({"metric": "cos"}, "metric is none of"),
        ({"metric": ["l2"]}, "metric is none of"),
        ({"name": "../etc"}, "name is not"),
        ({"model": None}, "model is not a string"),
        ({"sources": "docs"}, "sources are not a list"),
        ({"sources": [1]}, "sources are not strings"),
        ({"files": []}, "files are not an object"),
        ({"files": {}}, "files are not exactly"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "files are not exactly"),
        ({"files": {name: {"bytes": 1, "sha256": "0" * 64} for name in (*FILES, "x")}}, "files are not exactly"),
        ({"files": {name: {"bytes": 1, "sha256": "0" * 64} for name in FILES[1:]}}, "files are not exactly"),
        ({"files": {name: {"bytes": -1, "sha256": "0" * 64} for name in FILES}}, "is not a count of bytes"),
        ({"files": {name: {"bytes": 1, "sha256": "zz"} for name in FILES}}, "is not 64 hex digits"),
        ({"files": {name: {"bytes": 1} for name in FILES}}, "has not 'bytes' and 'sha256'"),
        ({"files": dict.fromkeys(FILES, 7)}, "has not 'bytes' and 'sha256'"),
        ({"colour": "red"}, "unknown fields colour"),
        ({"kind": "text"}, "kind is not datastore or vectors"),
        ({"kind": "vectors"}, "files are not exactly index.faiss"),
        ({"total": 16}, "ntotal is above total"),
        ({"shard": 1}, "shard is not below shards"),
        ({"shards": 2}, "ids.npy is in every shard"),
        ({"by": "lists"}, "by is neither"),
        ({"by": "list"}, "owners.npy is where"),
        ({"faiss_version": "new"}, "'new' is no version"),
    ],
)
def test_bad_field(build: Build, fields: dict[str, Any], said: str) -> None:
    index = build()
    change(index, **fields)
    assert said in fault(index)


def test_lacking_field(build: Build) -> None:
    index = build()
    path = index / "manifest.json"
    found = json.loads(path.read_text())
    del found["model"]
    path.write_text(json.dumps(found))
    assert "lacks model" in fault(index)


def test_written_by_a_newer_faiss(build: Build) -> None:
    index = build()
    change(index, faiss_version="99.0.0")
    assert "written by faiss 99.0.0, newer than" in fault(index)


def test_written_by_an_older_faiss(build: Build) -> None:
    index = build()
    change(index, faiss_version="1.7.4")
    assert open_index(index).manifest.faiss_version == "1.7.4"


@pytest.mark.parametrize(
    ("fields", "file"),
    [
        ({"dimension": 5}, "index.faiss"),
        ({"ntotal": 16, "total": 16}, "payloads.npy"),
        ({"metric": "ip"}, "index.faiss"),
    ],
)
def test_manifest_and_files_disagree(build: Build, fields: dict[str, Any], file: str) -> None:
    index = build()
    change(index, **fields)
    assert f"{file}: " in fault(index)


def test_vectors_fewer_than_payloads(build: Build) -> None:
    index = build()
    flat = faiss.IndexFlatL2(4)
    flat.add(np.zeros((3, 4), np.float32))
    faiss.write_index(flat, str(index / "index.faiss"))
    refresh(index)
    assert "index.faiss: d 4, 3 vectors, metric 1; the manifest says 4, 17, l2" in fault(index)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("index.faiss", b"nonsense", "faiss cannot read it"),
        ("payloads.npy", b"nonsense", "is no .npy file"),
        ("tokens.npy", b"", "is no .npy file"),
        ("tokenizer.json", b"{}", "holds no tokenizer that can be read"),
        ("tokenizer.json", b"\xff", "holds no tokenizer that can be read"),
        ("documents.json", b"{}", "holds no names with their starts"),
        ("documents.json", b'{"names": ["a"], "starts": [1]}', "holds no names with their starts"),
        ("documents.json", b'{"names": [1], "starts": [0]}', "holds no names with their starts"),
        ("documents.json", b'{"names": ["a"], "starts": [99999999999999999999]}', "holds no names with their starts"),
    ],
)
def test_files_that_are_no_such_files(build: Build, words: Tokenizer, name: str, raw: bytes, said: str) -> None:
    index = build(tokenizer=words.to_str())
    (index / name).write_bytes(raw)
    refresh(index)
    assert f"{name}: {said}" in fault(index)


def test_pickled_arrays_are_never_loaded(build: Build) -> None:
    index = build()
    np.save(index / "entries.npy", np.array([{}, 1], dtype=object))
    refresh(index)
    assert "entries.npy: is no .npy file" in fault(index)


def test_entries_outside_the_stream(build: Build) -> None:
    index = build()
    entries = np.load(index / "entries.npy")
    entries[-1] = 20
    np.save(index / "entries.npy", entries)
    refresh(index)
    assert "entries.npy: offsets leave the token stream" in fault(index)


def test_another_kind_of_index(build: Build) -> None:
    index = build()
    hashes = faiss.IndexLSH(4, 8)
    hashes.add(np.zeros((17, 4), np.float32))
    faiss.write_index(hashes, str(index / "index.faiss"))
    refresh(index)
    assert "which is not served" in fault(index)


def test_a_tokenizer_that_the_manifest_does_not_name_is_not_read(build: Build) -> None:
    index = build()
    (index / "tokenizer.json").write_text("{")
    datastore = open_index(index).datastore
    assert datastore is not None and datastore.tokenizer is None


def test_replaced_while_opened(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build()
    real = faiss.read_index

    def slow(path: str) -> faiss.Index:
        found = real(path)
        build(fingerprint="another")
        return found

    monkeypatch.setattr(faiss, "read_index", slow)
    with pytest.raises(ManifestError, match="was replaced while it was opened; open it again"):
        open_index(index)
