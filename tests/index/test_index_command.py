"""`ralmq index build` of vectors and of words, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ralmq
from ralmq.workers.index.store import open_index
from ralmq.workers.search.answer import answer
from ralmq.workers.texts.files import is_text

VECTORS = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    np.save(tmp_path / "v.npy", VECTORS)
    (tmp_path / "f.jsonl").write_text("".join(json.dumps({"row": row}) + "\n" for row in range(300)))
    (tmp_path / "a.txt").write_text("one two three")
    return tmp_path


def test_vectors_in_shards(home: Path) -> None:
    options = ("--factory", "IVF8,Flat", "--metric", "cosine", "--fields", "f.jsonl", "--encoder", "e")
    done = ralmq("index", "build", "v", "v.npy", "--out", "out", "--shards", "2", "--by", "list", *options, home=home)
    assert done.returncode == 0, done.stderr
    assert "300 entries of 8 dimensions (IVF8,Flat, cosine)" in done.stdout and "-o shard=i/2" in done.stdout
    parts = [open_index(home / "out" / f"shard-{shard}") for shard in range(2)]
    info = parts[1].info()
    assert (info["metric"], info["encoder"], info["shard"], info["by"]) == ("cosine", "e", 1, "list")
    found = [answer(part, {"k": 1, "payloads": True}, [2 * VECTORS[5:6]]) for part in parts]
    assert {"row": 5} in [body["payloads"][0][0] for body, _ in found]


def test_words(home: Path) -> None:
    done = ralmq("index", "build", "t", "a.txt", "--text", "--out", "out", home=home)
    assert done.returncode == 0 and "1 passages" in done.stdout and is_text(home / "out")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a.txt",), "texts with one of --model, --encoder and --text, or one .npy file"),
        (("a.txt", "--text", "--encoder", "e"), "texts with one of --model, --encoder and --text"),
        (("v.npy", "a.txt"), "or one .npy file"),
        (("v.npy", "--text"), "or one .npy file"),
        (("a.txt", "--text", "--fields", "f.jsonl"), "--fields: of a .npy file of vectors alone"),
        (("a.txt", "--text", "--shards", "2", "--metric", "ip"), "--metric and --shards: of an index of vectors alone"),
        (("a.txt", "--text", "--max-tokens", "9"), "--max-tokens: of --model alone"),
        (("a.txt", "--encoder", "no/such"), "no/such: no such model directory"),
        (("v.npy", "--encoder", "two words"), "--encoder two words: a name is 1 to 64"),
        (("v.npy", "--factory", "IVF8,PQ3"), "8 dimensions are no multiple of 3"),
        (("v.npy", "--fields", "a.txt"), "a.txt:1: is no JSON"),
        (("none.npy",), "none.npy: is no .npy file"),
        (("a.txt", "--model", "demo", "--factory", "IVF9x"), "no such index is served; give Flat"),
        (("a.txt", "--model", "demo", "--out", "a.txt"), "a.txt: is not a plain directory"),
        (("a.txt", "--model", "demo", "--out", "a.txt/in"), "nothing can be written to"),
        (("a.txt", "--model", "demo", "--broker", "nowhere"), "nowhere is no broker address"),
        (("a.txt", "--encoder", "e", "--out", "a.txt"), "a.txt: is not a plain directory"),
        (("a.txt", "--encoder", "e", "--factory", "IVF7,Flat"), "7 lists for 1 vectors"),
    ],
)
def test_what_cannot_be_built(home: Path, given: tuple[str, ...], said: str) -> None:
    """In one line, which stands alone: before a model is started or a service is asked, there is no bar."""
    done = ralmq("index", "build", "v", "--out", "out", *given, home=home)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (home / "out").exists()


def test_an_index_is_replaced_where_that_is_asked_for(home: Path) -> None:
    for given in (("v.npy", "--out", "vectors", "--shards", "2"), ("a.txt", "--text", "--out", "words")):
        build = ("index", "build", "i", *given)
        assert ralmq(*build, home=home).returncode == 0
        before = {path: path.read_bytes() for path in home.rglob("manifest.json")}
        done = ralmq(*build, home=home)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "holds an index already; add --replace" in done.stderr
        assert {path: path.read_bytes() for path in home.rglob("manifest.json")} == before
        assert ralmq(*build, "--replace", home=home).returncode == 0
    (home / "mine").mkdir()
    (home / "mine" / "letter.txt").write_text("mine")
    done = ralmq("index", "build", "i", "v.npy", "--out", "mine", "--replace", home=home)
    assert done.returncode == 2 and "no part of an index" in done.stderr and (home / "mine" / "letter.txt").exists()
