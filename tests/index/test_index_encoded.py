"""Texts to vectors by an encoder and into an index: built from a folder, added to, searched with text."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import broker, eventually, ralmq, started
from encoder.encoders import oracle, tokenizer, write
from inprocess import cluster
from ralmq.errors import NoService, WorkerFailed
from ralmq.workers.base import Request, Worker
from ralmq.workers.datastore.encoded import AT_ONCE, IN_FLIGHT, build_encoded, embedded, passage_fields
from ralmq.workers.datastore.sources import Document, SourceError
from ralmq.workers.index.store import open_index

TEXTS = {"a.txt": "w1 w2 w3 w4", "b.md": "w11 w12 w13", "c.txt": "w21 w22 w23 w24 w25"}


class Lengths(Worker):
    """A stand-in for a model: the vector of a text is (its length, its number of words)."""

    service = "embed:lengths"

    def __init__(self, width: int = 2, missing: int = 0) -> None:
        self.asked: list[int] = []
        self.most = self.now = 0
        self.width, self.missing = width, missing

    async def handle(self, request: Request) -> Any:
        texts = request.body["texts"]
        width = 2 if self.asked else self.width
        self.asked.append(len(texts))
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        rows = [[len(text), len(text.split()), *[0] * 9] for text in texts[self.missing :]]
        return {"model": "lengths"}, [np.array(rows, np.float32).reshape(len(rows), 11)[:, :width]]


def test_every_text_gets_its_own_vector_a_few_requests_at_a_time() -> None:
    texts = ["x" * (number % 97 + 1) + " y" * (number % 5) for number in range(6 * AT_ONCE + 5)]
    seen: list[tuple[str, int, int]] = []

    async def main() -> None:
        worker = Lengths()
        async with cluster(worker) as running:
            client = await running.client()
            found = await embedded(client, "lengths", texts, lambda *said: seen.append(said))
            assert found.dtype == np.float32
            assert found.tolist() == [[len(text), len(text.split())] for text in texts]
            assert sorted(worker.asked) == [5, *[AT_ONCE] * 6] and 1 < worker.most <= IN_FLIGHT
            with pytest.raises(NoService, match="embed:nobody"):
                await embedded(client, "nobody", texts)

    asyncio.run(main())
    assert seen[0] == ("encode", 0, len(texts)) and seen[-1] == ("encode", len(texts), len(texts))


@pytest.mark.parametrize(("worker", "said"), [({"missing": 1}, "no vector for each"), ({"width": 3}, "another model")])
def test_an_encoder_that_answers_otherwise_is_not_believed(worker: dict[str, int], said: str) -> None:
    async def main() -> None:
        async with cluster(Lengths(**worker)) as running:
            with pytest.raises(WorkerFailed, match=said):
                await embedded(await running.client(), "lengths", ["a"] * (2 * AT_ONCE))

    asyncio.run(main())


def test_passages_are_the_payloads(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(250))

    async def main() -> None:
        async with cluster(Lengths()) as running:
            client = await running.client()
            documents = [Document("long.txt", text), Document("short.txt", "just this")]
            await build_encoded(
                client, encoder="lengths", name="docs", documents=documents, out=tmp_path / "docs", shards=1
            )
            with pytest.raises(SourceError, match="hold no word"):
                await build_encoded(
                    client, encoder="lengths", name="docs", documents=[Document("a", " ")], out=tmp_path / "none"
                )

    asyncio.run(main())
    found = open_index(tmp_path / "docs").payloads(np.arange(4)[None])[0]
    assert [payload["document"] for payload in found] == ["long.txt"] * 3 + ["short.txt"]
    for payload in found[:3]:
        assert text[payload["start"] :].startswith(payload["text"]) and len(payload["text"].split()) <= 100
    assert found == passage_fields([Document("long.txt", text), Document("short.txt", "just this")])
    assert open_index(tmp_path / "docs").info()["encoder"] == "lengths"


def test_a_folder_by_a_model_directory_then_asked_and_added_to(tmp_path: Path) -> None:
    """One build starts an encoder of its own, the other asks one that is served; both give transformers' vectors."""
    write(tmp_path / "mini")
    (tmp_path / "texts").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "texts" / name).write_text(text)
    (tmp_path / "more.txt").write_text("w31 w32 w33")
    (tmp_path / "more.jsonl").write_text('{"text": "w41 w42", "lang": "de"}\n{"text": "w51 w52 w53"}\n')
    (tmp_path / "worse.jsonl").write_text('{"text": "w41"}\n{"lang": "de"}\n')

    def said(*arguments: str, code: int = 0) -> str:
        done = ralmq(*arguments, home=tmp_path)
        assert done.returncode == code and (not code or done.stderr.count("\n") == 1), done.stderr
        return done.stderr if code else done.stdout

    shown = said("index", "build", "docs", "texts", "--encoder", "./mini", "--out", "made")
    assert "3 entries of 32 dimensions" in shown and "cosine" in shown
    assert f"ralmq worker encoder -o model={tmp_path / 'mini'}" in shown
    rows = [encoding.ids for encoding in truncated(list(TEXTS.values()))]
    wanted = oracle(tmp_path / "mini", rows, "mean", True).numpy()
    with broker(tmp_path) as url:
        homes = [tmp_path / f"worker-{number}" for number in range(2)]
        for home in homes:
            home.mkdir()
        encoder = ("encoder", "-o", f"model={tmp_path / 'mini'}")
        index = ("index", "-o", f"index={tmp_path / 'made'}", "-o", "live=true")
        at = ("--broker", url)
        with (
            started("worker", *encoder, *at, home=homes[0]),
            started("worker", *index, *at, home=homes[1]),
        ):
            ready = ("status", "--expect", "search:docs", "--expect", "embed:mini", *at)
            eventually(lambda: ralmq(*ready, home=tmp_path).returncode == 0)
            said("index", "build", "docs", "texts", "--encoder", "mini", "--out", "asked", *at)
            for built in ("made", "asked"):
                opened = open_index(tmp_path / built)
                stored = np.stack([opened.segment.index.reconstruct(row) for row in range(3)])
                assert np.abs(stored - wanted).max() < 1e-5
            found = json.loads(said("search", "docs", "w11 w12 w13", "--k", "1", "--json", *at))
            assert found["payloads"] == [[{"document": "texts/b.md", "start": 0, "text": TEXTS["b.md"]}]]
            assert found["distances"][0][0] == pytest.approx(1, abs=1e-5)
            assert "1 added: 3" in said("index", "add", "docs", "more.txt", *at)
            assert json.loads(said("index", "add", "docs", "more.jsonl", "--json", *at)) == {"ids": [4, 5]}
            for query, text in (("w31 w32 w33", "w31 w32 w33"), ("w41 w42", "w41 w42")):
                [[payload]] = json.loads(said("search", "docs", query, "--k", "1", "--json", *at))["payloads"]
                assert payload["text"] == text
            assert "line 2 has no text" in said("index", "add", "docs", "worse.jsonl", *at, code=2)
            assert "--fields belongs to a .npy" in said(
                "index", "add", "docs", "more.txt", "--fields", "more.jsonl", *at, code=2
            )


def truncated(texts: list[str]) -> Any:
    """As the worker reads them: cut at the model's context, not at the few tokens that the file says."""
    made = tokenizer()
    made.no_truncation()
    made.no_padding()
    return made.encode_batch(texts)
