"""Filters inside the search against brute force, and the fields that answers carry."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ralmq.workers.index import segment
from ralmq.workers.index.directory import OutputError
from ralmq.workers.index.fields import MAX_FIELDS, BadFields, dump_fields
from ralmq.workers.index.filter import BadFilter, parse
from ralmq.workers.index.query import BadQuery
from ralmq.workers.index.store import OpenIndex, open_index
from ralmq.workers.index.vectors import read_fields, read_vectors
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.search.answer import answer

N, D = 4000, 8
RNG = np.random.default_rng(2)
VECTORS = RNG.normal(size=(N, D)).astype(np.float32)
QUERIES = RNG.normal(size=(6, D)).astype(np.float32)
FIELDS: list[dict[str, Any]] = [
    {"n": row, "part": row % 100, "name": f"e{row % 7}", "odd": row % 2 == 1, "at": {"year": 1990 + row % 30}}
    | ({"rare": "x"} if row % 500 == 0 else {})
    | ({"mixed": row if row % 2 else str(row)})
    for row in range(N)
]
TEXTS = [dump_fields(fields) for fields in FIELDS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., OpenIndex]:
    folder = tmp_path_factory.mktemp("filter")

    def build(factory: str) -> OpenIndex:
        out = folder / factory
        if not out.exists():
            write_vectors(out, name="v", vectors=VECTORS, fields=TEXTS, factory=factory)
        return open_index(out)

    return build


CASES: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"part": 3}, lambda f: f["part"] == 3),
    ({"name": "e2", "odd": True}, lambda f: f["name"] == "e2" and f["odd"]),
    ({"at.year": {"gte": 2000, "lt": 2002}}, lambda f: 2000 <= f["at"]["year"] < 2002),
    ({"name": {"in": ["e1", "e5", 'x"; DROP TABLE fields']}}, lambda f: f["name"] in ("e1", "e5")),
    ({"or": [{"part": 1}, {"and": [{"part": 2}, {"odd": False}]}]}, lambda f: f["part"] in (1, 2)),
    ({"not": {"part": {"gt": 0}}}, lambda f: f["part"] == 0),
    ({"not": {"rare": "x"}}, lambda f: "rare" not in f),
    ({"rare": None}, lambda f: "rare" not in f),
    ({"rare": "x"}, lambda f: "rare" in f),
    ({"mixed": {"gt": 3990}}, lambda f: isinstance(f["mixed"], int) and f["mixed"] > 3990),
    ({"mixed": {"gte": "3990"}}, lambda f: isinstance(f["mixed"], str) and f["mixed"] >= "3990"),
    ({"part": {"lte": 1}, "name": "e3"}, lambda f: f["part"] <= 1 and f["name"] == "e3"),
    ({"name": "' OR 1=1 --"}, lambda f: False),
]


@pytest.mark.parametrize("factory", ["Flat", "IVF20,Flat", "HNSW16"])
@pytest.mark.parametrize(("given", "holds"), CASES)
def test_the_nearest_of_those_allowed(
    made: Callable[..., OpenIndex], factory: str, given: dict[str, Any], holds: Callable[[dict[str, Any]], bool]
) -> None:
    """Recall is 1: where few are allowed all lists are looked into, and a graph is not walked."""
    rows = np.array([row for row, fields in enumerate(FIELDS) if holds(fields)], np.int64)
    scores = ((QUERIES[:, None].astype(float) - VECTORS[rows][None]) ** 2).sum(axis=2)
    wanted = rows[np.argsort(scores, axis=1)[:, :10]]
    _, (ids, distances) = answer(made(factory), {"k": 10, "filter": given}, [QUERIES])
    assert np.array_equal(ids[:, : wanted.shape[1]], wanted)
    assert (ids[:, wanted.shape[1] :] == -1).all() and np.isinf(distances[:, wanted.shape[1] :]).all()


def test_a_named_nprobe_is_kept(made: Callable[..., OpenIndex]) -> None:
    ids = answer(made("IVF20,Flat"), {"k": 100, "nprobe": 1, "filter": {"odd": True}}, [QUERIES])[1][0]
    plain = answer(made("IVF20,Flat"), {"k": 1000, "nprobe": 1}, [QUERIES])[1][0]
    for row, all_in_list in zip(ids, plain, strict=True):
        assert set(row.tolist()) <= set(all_in_list.tolist()) and (row[row >= 0] % 2 == 1).all()


def test_fields_come_with_the_answer(made: Callable[..., OpenIndex]) -> None:
    body, (ids, _) = answer(made("Flat"), {"k": 10, "filter": {"rare": "x"}, "payloads": True}, [QUERIES])
    assert [[payload.get("n", -1) for payload in row] for row in body["payloads"]] == ids.tolist()
    assert all(payload == FIELDS[payload["n"]] for row in body["payloads"] for payload in row if payload)
    assert sum(not payload for row in body["payloads"] for payload in row) == 6 * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("part", "a filter is a map"),
        ({}, "a filter is a map"),
        ({"colour": 1}, "no entry has the field colour"),
        ({"part": {"near": 1}}, "'near' is no operator"),
        ({"part": {}}, "is an empty map"),
        ({"part": [1]}, "is compared with"),
        ({"part": float("nan")}, "is compared with nan"),
        ({"part": 1 << 63}, "is compared with"),
        ({"part": {"in": 3}}, "in of part is 3"),
        ({"part": {"gt": None}}, "gt of part is None"),
        ({'a") OR 1': 1}, "is no field of a filter"),
        ({"a..b": 1}, "is no field of a filter"),
        ({1: 1}, "is no field of a filter"),
        ({"and": []}, "and of a filter is"),
        ({"not": [1]}, "a filter is a map"),
        ({"and": [{"part": 1}] * 600}, "over 256 comparisons"),
    ],
)
def test_filters_that_are_refused(made: Callable[..., OpenIndex], given: Any, said: str) -> None:
    with pytest.raises(BadFilter) as caught:
        answer(made("Flat"), {"filter": given}, [QUERIES])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_deep_filters_are_refused() -> None:
    given: Any = {"part": 1}
    for _ in range(9):
        given = {"not": given}
    with pytest.raises(BadFilter, match="nested deeper"):
        parse(given)


def test_nothing_of_the_asker_is_in_the_statement() -> None:
    made = parse({"name": "'; DROP", "a.b": {"in": ["'"]}})
    assert (
        "DROP" not in made.sql and "name" not in made.sql and made == parse({"name": "'; DROP", "a.b": {"in": ["'"]}})
    )


def test_a_filter_without_fields(build: Callable[..., Path]) -> None:
    with pytest.raises(BadQuery, match="has no fields to filter by"):
        answer(open_index(build()), {"filter": {"a": 1}}, [QUERIES[:, :4]])


def test_shards_have_the_fields_of_their_own(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v", name="v", vectors=VECTORS, fields=TEXTS, shards=3)
    for shard in range(3):
        index = open_index(tmp_path / "v" / f"shard-{shard}")
        body, (ids, _) = answer(index, {"k": 30, "filter": {"part": 5}, "payloads": True}, [QUERIES[:1]])
        assert sorted(ids[0][ids[0] >= 0].tolist()) == [row for row in range(5, N, 100) if row % 3 == shard]
        assert [payload.get("n", -1) for payload in body["payloads"][0]] == ids[0].tolist()


@pytest.mark.parametrize(
    "value", [[1], {"a": float("nan")}, {"a": b"x"}, {1: 2}, {"a": "\ud800"}, {"a": "x" * MAX_FIELDS}]
)
def test_fields_that_cannot_be_kept(value: Any) -> None:
    with pytest.raises(BadFields):
        dump_fields(value)


def test_files_of_vectors_and_fields(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VECTORS.astype(np.float64))
    assert np.array_equal(read_vectors(tmp_path / "a.npy"), VECTORS)
    (tmp_path / "f.jsonl").write_text("\n".join(json.dumps(fields) for fields in FIELDS[:3]) + "\n")
    assert [json.loads(text) for text in read_fields(tmp_path / "f.jsonl")] == FIELDS[:3]
    np.save(tmp_path / "i.npy", np.zeros((3, 3), np.int32))
    np.save(tmp_path / "o.npy", np.array([[{}]], dtype=object))
    for name in ("i.npy", "o.npy", "f.jsonl", "none.npy"):
        with pytest.raises(OutputError, match=name):
            read_vectors(tmp_path / name)
    for text, said in (
        ("[1]\n", "f.jsonl:1: is no map"),
        ('{"a": 1}\n{\n', "f.jsonl:2: is no JSON"),
        ("\xff", "UTF-8"),
    ):
        (tmp_path / "f.jsonl").write_text(text, encoding="latin-1")
        with pytest.raises(OutputError, match=said):
            read_fields(tmp_path / "f.jsonl")
    with pytest.raises(OutputError, match="2 lines of fields for 3 vectors"):
        write_vectors(tmp_path / "v", name="v", vectors=VECTORS[:3], fields=TEXTS[:2])


@pytest.mark.parametrize("factory", ["IVF100,Flat", "IVF100,SQ8", "HNSW16"])
def test_what_is_allowed_is_found_though_it_lies_far_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    """A fifth of all entries, none of them near the queries: lists and graph lead there by widening alone."""
    monkeypatch.setattr(segment, "FEW", 10)
    far = np.arange(N) % 5 == 0
    given = VECTORS + np.where(far, 50, 0).astype(np.float32)[:, None]
    texts = [dump_fields({"far": bool(each), "few": row == 5}) for row, each in enumerate(far)]
    write_vectors(tmp_path / "v", name="v", vectors=given, fields=texts, factory=factory)
    index = open_index(tmp_path / "v")
    _, (ids, _) = answer(index, {"k": 10, "filter": {"far": True}}, [QUERIES])
    assert (ids >= 0).all() and (ids % 5 == 0).all()
    _, (ids, _) = answer(index, {"k": 3, "filter": {"few": True}}, [QUERIES])
    assert ids.tolist() == [[5, -1, -1]] * len(QUERIES)
