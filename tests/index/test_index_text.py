"""A text index ranks as BM25 does, takes any query as words, filters, and keeps what was changed."""

import random
import sqlite3
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index.text_reference import bm25
from ralmq.workers.index.directory import OutputError
from ralmq.workers.index.filter import BadFilter
from ralmq.workers.index.manifest import ManifestError
from ralmq.workers.index.query import BadQuery, Params
from ralmq.workers.texts.answer import answer_text
from ralmq.workers.texts.files import LIVE, build_text
from ralmq.workers.texts.index import MAX_WORDS, Row, TextIndex, expression, row_of
from ralmq.workers.texts.passages import passages

DRAW = random.Random(11)
VOCABULARY = [f"word{number}" for number in range(300)]
DOCUMENTS = [
    (f"d{number}.txt", " ".join(DRAW.choices(VOCABULARY, [1 / (rank + 1) for rank in range(300)], k=60 + 7 * number)))
    for number in range(40)
]
HOSTILE = [
    '"',
    "'",
    "*",
    "NEAR(",
    "word1 AND",
    "OR",
    "NOT word3",
    "text:word2",
    "^word9",
    "a\0b",
    "{}",
    ")(",
    "-",
    "",
    "½",
]


def ids(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


def ask(index: TextIndex, *texts: str, **more: Any) -> tuple[list[list[int]], list[list[dict[str, Any]]]]:
    body, arrays = answer_text(index, {"text": list(texts), "payloads": True, **more}, [])
    return arrays[0].tolist(), body["payloads"]


def map_rows(*texts: str) -> list[Row]:
    return [row_of({"text": text}, 1000) for text in texts]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build_text(tmp_path / "notes", name="notes", documents=DOCUMENTS, words=20, overlap=5)
    return tmp_path / "notes"


def everything() -> dict[int, str]:
    return dict(enumerate(piece.text for _, text in DOCUMENTS for piece in passages(text, 20, 5)))


@pytest.mark.parametrize("length", [0, 1, 4, 5, 19, 20, 21, 35, 36, 50])
def test_passages_cover_a_document_and_overlap(length: int) -> None:
    document = "  " + "\n ".join(f"w{number}" for number in range(length)) + " "
    found = list(passages(document, 20, 5))
    assert all(document[start : start + len(text)] == text for start, text in found)
    lines = [text.split() for _, text in found]
    assert all(len(line) == 20 for line in lines[:-1]) and all(0 < len(line) <= 20 for line in lines)
    assert all(before[-5:] == line[:5] and len(line) > 5 for before, line in pairwise(lines))
    assert [word for place, line in enumerate(lines) for word in line[5 if place else 0 :]] == document.split()


def test_a_run_without_a_space_is_cut_too() -> None:
    assert [len(text) for _, text in passages("x" * 64 * 250)] == [6400, 6400, 64 * 90]


@pytest.mark.parametrize("k", [1, 10, 500])
def test_ranks_as_bm25(built: Path, k: int) -> None:
    index, texts = TextIndex(built), everything()
    asked = ["word1", "word3 word30 word200", "Word5, WORD77! nobody word5", DOCUMENTS[3][1][:400]]
    body, arrays = answer_text(index, {"text": asked, "k": k}, [])
    assert body == {"version": index.info()["version"]} and [array.dtype for array in arrays] == [np.int64, np.float32]
    for query, numbers, scores in zip(asked, *(array.tolist() for array in arrays), strict=True):
        wanted = bm25(query, texts, k)
        assert len(wanted) > 5 or k == 1
        assert numbers == [number for number, _ in wanted] + [-1] * (k - len(wanted))
        assert np.allclose(scores[: len(wanted)], [score for _, score in wanted], rtol=1e-5, atol=1e-9)
        assert scores[len(wanted) :] == [-np.inf] * (k - len(wanted))


def test_equal_scores_come_by_id(tmp_path: Path) -> None:
    build_text(
        tmp_path / "same", name="same", documents=[(f"{n}", "same words" if n % 3 else "other") for n in range(30)]
    )
    found, _ = ask(TextIndex(tmp_path / "same"), "same", k=30)
    assert found[0] == [n for n in range(30) if n % 3] + [-1] * 10


def test_payloads_are_pieces_of_the_documents(built: Path) -> None:
    [numbers], [line] = ask(TextIndex(built), "word7", k=400)
    known = dict(DOCUMENTS)
    assert 10 < sum(number >= 0 for number in numbers) < 400
    for number, payload in zip(numbers, line, strict=True):
        if number < 0:
            assert payload == {}
            continue
        assert sorted(payload) == ["document", "start", "text"] and "word7" in payload["text"].split()
        assert known[payload["document"]][payload["start"] :].startswith(payload["text"])


@pytest.mark.parametrize("text", HOSTILE)
def test_signs_of_the_query_language_are_no_more_than_signs(built: Path, text: str) -> None:
    index = TextIndex(built)
    wanted = bm25(text, everything(), 10)
    [numbers], _ = ask(index, text)
    assert numbers == [number for number, _ in wanted] + [-1] * (10 - len(wanted))
    [together], _ = ask(index, f"{text} word250 {text}")
    wanted = bm25(f"{text} word250", everything(), 10)
    assert wanted and together == [number for number, _ in wanted] + [-1] * (10 - len(wanted))


def test_words_are_found_whatever_their_case_and_accents(tmp_path: Path) -> None:
    build_text(tmp_path / "w", name="w", documents=[("a", "École normale"), ("b", "straße"), ("c", "x"), ("d", "y")])
    index = TextIndex(tmp_path / "w")
    found, _ = ask(index, "ecole", "E\u0301COLE", "STRASSE", "Straße", k=1)
    assert found == [[0], [0], [-1], [1]]


def test_a_long_query_counts_its_first_words(built: Path) -> None:
    text = " ".join([*(f"none{number}" for number in range(MAX_WORDS - 1)), "word9", "word1"])
    assert expression(text).endswith(' OR "word9"')
    assert ask(TextIndex(built), text) == ask(TextIndex(built), "word9")


def test_filters_choose_before_the_best_are_taken(built: Path) -> None:
    index, texts = TextIndex(built), everything()
    [everywhere], [payloads] = ask(index, "word1 word2", k=1000)
    chosen = ("d3.txt", "d39.txt")
    filters: list[tuple[Any, Callable[[dict[str, Any]], bool]]] = [
        ({"document": "d7.txt"}, lambda p: p["document"] == "d7.txt"),
        (
            {"document": {"in": [*chosen]}, "start": {"gte": 100}},
            lambda p: p["document"] in chosen and p["start"] >= 100,
        ),
        ({"not": {"start": {"gt": 0}}}, lambda p: p["start"] == 0),
        ({"document": "nobody"}, lambda p: False),
    ]
    for given, keeps in filters:
        wanted = [number for number, p in zip(everywhere, payloads, strict=True) if number >= 0 and keeps(p)]
        [found], _ = ask(index, "word1 word2", k=5, filter=given)
        assert found == (wanted + [-1] * 5)[:5]
    assert len(texts) > 200
    with pytest.raises(BadFilter):
        ask(index, "word1", filter={"start": {"near": 3}})


def test_a_field_that_no_passage_has_is_refused(built: Path) -> None:
    """As by an index of vectors, a live one too: a misspelt name would else look like a filter that nothing passes."""
    index = TextIndex(built)
    for condition in ({"lang": "de"}, {"or": [{"start": 0}, {"lang": "de"}]}, {"not": {"lang": "de"}}):
        with pytest.raises(BadFilter, match="no entry has the field lang; filter by one of the fields"):
            ask(index, "word1", filter=condition)
    [number] = index.add([row_of({"text": "word1", "lang": "de"}, 99)])
    assert ask(index, "word1", k=1, filter={"lang": "de"})[0] == [[number]]
    with pytest.raises(BadFilter, match="no entry has the field tongue"):
        ask(index, "word1", filter={"tongue": "de"})


def test_how_far_to_look_changes_nothing(built: Path) -> None:
    """Every passage is ranked: what bounds an approximate search has nothing to bound."""
    wanted = ask(TextIndex(built), "word1 word2", k=50)
    for more in ({"nprobe": 1}, {"ef": 1}, {"exact": True}):
        assert ask(TextIndex(built), "word1 word2", k=50, **more) == wanted


def test_changes_are_searched_at_once_and_are_there_after_opening_again(built: Path) -> None:
    index, texts = TextIndex(built), everything()
    assert not (built / LIVE).exists(), "nothing is copied before the first change"
    before = index.info()
    _, [given] = answer_text(
        index, {"add": True, "fields": [{"text": "quaxel word1", "lang": "en"}, {"text": "word2"}]}, []
    )
    assert given.tolist() == [len(texts), len(texts) + 1]
    body, _ = answer_text(index, {"delete": True}, [ids(0, 3, 3, 10**9)])
    assert body == {"deleted": 2}
    _, [given] = answer_text(index, {"add": True, "fields": [{"text": "quaxel quaxel"}], "upsert": True}, [ids(5)])
    assert given.tolist() == [5]
    now = {number: text for number, text in texts.items() if number not in (0, 3)}
    now |= {5: "quaxel quaxel", len(texts): "quaxel word1", len(texts) + 1: "word2"}
    for opened in (index, TextIndex(built)):
        for query in ("quaxel", "word1", "word2 word40"):
            assert ask(opened, query)[0] == [([n for n, _ in bm25(query, now, 10)] + [-1] * 10)[:10]]
        _, [line] = ask(opened, "quaxel", k=2, filter={"lang": "en"})
        assert line == [{"lang": "en", "text": "quaxel word1"}, {}]
        info = opened.info()
        assert info["ntotal"] == len(now) and info["changes"] == 3 and info["version"] != before["version"]


def test_an_id_that_was_deleted_is_given_to_nobody_else(built: Path) -> None:
    index = TextIndex(built)
    [first] = index.add([*map_rows("one")])
    assert index.delete([first]) == 1 and index.delete([first]) == 0
    assert index.add([*map_rows("two")]) == [first + 1]
    assert TextIndex(built).add([*map_rows("three")]) == [first + 2]


def test_a_change_that_is_refused_changes_nothing(built: Path) -> None:
    index = TextIndex(built)
    index.add(map_rows("quaxel"), [900_000])
    before = index.info()
    fields = [{"text": "new"}, {"text": "newer"}]
    for body, arrays, said in (
        ({"add": True, "fields": fields}, [ids(900_001, 900_000)], "id 900000 is there already"),
        ({"add": True, "fields": fields}, [ids(7, 7)], "all different"),
        ({"add": True, "fields": fields}, [ids(7)], "1 ids came for 2 passages"),
        ({"add": True, "fields": fields}, [ids(-1, 7)], "ids must be 0"),
        ({"add": True, "fields": fields}, [np.array([1.0, 2.0])], "ids are float64"),
        ({"add": True, "fields": fields}, [ids(1), ids(2)], "2 arrays came"),
        ({"add": True, "fields": []}, [], "a list of maps"),
        ({"add": True, "fields": [{"text": "ok"}, {"text": " ?! "}]}, [], "a text with a word"),
        ({"add": True, "fields": [{"document": "d"}]}, [], "a text with a word"),
        ({"add": True, "fields": [{"text": "ok", "x": float("nan")}]}, [], "finite numbers"),
        ({"add": True, "fields": [{"text": "ok", "x": b"bytes"}]}, [], "finite numbers"),
        ({"add": True, "fields": [{"text": "ok " * 20_000}]}, [], "cut it into passages"),
        ({"add": True, "fields": [{"text": "ok"}] * 4097}, [], "too many"),
        ({"delete": True}, [], "0 arrays came"),
        ({"delete": True}, [np.zeros((2, 2), np.int64)], "ids are int64"),
        ({"delete": 3}, [], "send true or false"),
    ):
        with pytest.raises(BadQuery, match=said):
            answer_text(index, body, arrays)
    assert index.info() == before


@pytest.mark.parametrize(
    ("body", "arrays", "said"),
    [
        ({}, [], "asked with text"),
        ({"text": []}, [], "asked with text"),
        ({"text": "word1"}, [], "asked with text"),
        ({"text": ["word1", 3]}, [], "asked with text"),
        ({"text": ["word1"]}, [np.zeros((1, 4), np.float32)], "asked with text"),
        ({"text": ["word1"], "k": 0}, [], "k is 0"),
        ({"text": ["word1"], "k": 1025}, [], "k is 1025"),
        ({"text": ["word1"], "colour": 1}, [], "unknown field colour"),
        ({"text": ["word1"], "nprobe": 0}, [], "nprobe is 0"),
        ({"text": ["word1"], "version": "x"}, [], "not 'x'; ask for its info"),
        ({"text": ["word1"], "payloads": "yes"}, [], "payloads is 'yes'"),
        ({"text": ["word1"], "following": True}, [], "no following tokens"),
        ({"text": ["word1"] * 1025}, [], "1025 queries"),
        ({"text": ["word1"] * 1000, "payloads": True}, [], "payloads of 10000 hits"),
    ],
)
def test_queries_that_are_refused(built: Path, body: dict[str, Any], arrays: list[Any], said: str) -> None:
    with pytest.raises(BadQuery, match=said):
        answer_text(TextIndex(built), body, arrays)


def test_payloads_that_no_reply_holds_are_refused(built: Path) -> None:
    index = TextIndex(built)
    index.add(map_rows("x"))
    answer_text(index, {"add": True, "fields": [{"text": f"quaxel {'y' * 30_000}"}] * 40}, [])
    assert len(ask(index, "quaxel", k=20)[0][0]) == 20
    with pytest.raises(BadQuery, match="a reply holds"):
        ask(index, "quaxel", k=40)


def test_a_snapshot_is_an_index_of_its_own(built: Path) -> None:
    index = TextIndex(built)
    index.add(map_rows("quaxel"), [12_345])
    index.delete([1])
    body, _ = answer_text(index, {"snapshot": True}, [])
    at = built / "snapshots" / body["version"]
    index.delete([12_345])
    again = TextIndex(at)
    assert again.manifest.ntotal == again.info()["ntotal"] == len(everything())
    assert ask(again, "quaxel")[0][0][0] == 12_345 and ask(index, "quaxel")[0][0][0] == -1
    assert again.add(map_rows("more")) == [12_346], "numbers go on where they were"


def test_threads_search_while_others_change(built: Path) -> None:
    """Every answer belongs to one state: both words of a pair are added in one change, so they are found together."""
    index, faults, done = TextIndex(built), [], threading.Event()

    def search() -> None:
        while not done.is_set():
            found, _ = ask(index, "leftle", "rightle", k=1000)
            if [n + 1 for n in found[0] if n >= 0] != [n for n in found[1] if n >= 0]:
                faults.append(found)

    def change() -> None:
        for _ in range(20):
            given = index.add(map_rows("leftle", "rightle"))
            if index.search(["rightle"], Params(k=1000))[0][0].tolist()[0].count(given[1]) != 1:
                faults.append(given)

    searchers = [threading.Thread(target=search) for _ in range(2)]
    changers = [threading.Thread(target=change) for _ in range(2)]
    for thread in (*searchers, *changers):
        thread.start()
    for thread in changers:
        thread.join()
    done.set()
    for thread in searchers:
        thread.join()
    assert not faults and index.info()["changes"] == 40


def test_two_servers_of_one_directory_see_each_other(built: Path) -> None:
    first, second = TextIndex(built), TextIndex(built)
    assert ask(second, "quaxel")[0][0][0] == -1
    [given] = first.add(map_rows("quaxel"))
    assert ask(second, "quaxel")[0][0][0] == given
    assert second.add(map_rows("more")) == [given + 1]


def test_damage_is_found_before_it_is_served(built: Path, tmp_path: Path) -> None:
    whole = (built / "text.db").read_bytes()
    draw = random.Random(2)
    for _ in range(50):
        place = draw.randrange(len(whole) * 8)
        bad = bytearray(whole)
        bad[place // 8] ^= 1 << place % 8
        (built / "text.db").write_bytes(bad)
        with pytest.raises(ManifestError, match="changed or damaged"):
            TextIndex(built)
    (built / "text.db").unlink()
    with pytest.raises(ManifestError, match="cannot be read"):
        TextIndex(built)
    for content in ("", "[]", "{", '{"kind": "text", "format": 2}', '{"kind": "text", "format": 1}'):
        (built / "manifest.json").write_text(content)
        with pytest.raises(ManifestError):
            TextIndex(built)
    with pytest.raises(ManifestError, match="no such index directory"):
        TextIndex(tmp_path / "none")


def test_changes_of_another_build_are_not_served(built: Path, tmp_path: Path) -> None:
    index = TextIndex(built)
    index.add(map_rows("quaxel"))
    index.close()
    other = tmp_path / "other"
    build_text(other, name="notes", documents=DOCUMENTS[:2])
    (other / LIVE).write_bytes((built / LIVE).read_bytes())
    with pytest.raises(ManifestError, match="another build"):
        TextIndex(other)
    (other / LIVE).write_bytes(b"no database" * 1000)
    with pytest.raises(ManifestError, match="cannot be read"):
        TextIndex(other)
    with pytest.raises(OutputError, match=LIVE):
        build_text(other, name="notes", documents=DOCUMENTS[:2])


@pytest.mark.parametrize(
    ("name", "documents", "said"), [("a b", DOCUMENTS, "index name"), ("a", [("d", " ")], "no word")]
)
def test_what_cannot_be_built_leaves_nothing(tmp_path: Path, name: str, documents: Any, said: str) -> None:
    with pytest.raises(OutputError, match=said):
        build_text(tmp_path / "out", name=name, documents=documents)
    assert not list(tmp_path.iterdir())


def test_what_was_built_is_in_one_file_with_its_words(built: Path) -> None:
    with sqlite3.connect(built / "text.db") as database:
        assert database.execute("SELECT count(*) FROM passages").fetchone() == (len(everything()),)
    assert sorted(path.name for path in built.iterdir()) == ["manifest.json", "text.db"]
