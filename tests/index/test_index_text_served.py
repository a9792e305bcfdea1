"""A text index as a service: searched by name with text, changed while it is served, killed while it is changed."""

import asyncio
import contextlib
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import broker as running_broker
from commands import eventually, ralmq, started
from inprocess import Cluster, cluster
from ralmq.client.client import connect
from ralmq.errors import RalmqError, Refused
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.search.worker import Index
from ralmq.workers.texts.files import build_text, is_text
from serving import broker, free_url, worker

DOCUMENTS = [
    ("owls.txt", "The barn owl hunts voles at night over open fields."),
    ("ships.txt", "A brig has two square rigged masts; a barque has three or more."),
    ("bread.txt", "Rye bread keeps longer than wheat bread."),
    ("more.txt", "Nothing of that kind is here."),
]


def test_a_client_searches_and_changes_it_by_name(tmp_path: Path) -> None:
    build_text(tmp_path / "notes", name="notes", documents=DOCUMENTS)

    async def body(running: Cluster) -> None:
        client = await running.client()
        hits = await client.search("notes", 'which masts has a "barque"?', k=2)
        assert hits.ids[0, 0] == 1
        assert hits.payloads[0][0] == {"document": "ships.txt", "start": 0, "text": DOCUMENTS[1][1]}
        several = await client.search("notes", ["owl", "bread"], k=1, payloads=False)
        assert several.ids.tolist() == [[0], [2]] and (several.distances > 0).all()
        info = (await client.request("search:notes", {"info": True})).body
        assert (info["kind"], info["ntotal"], info["metric"], info["name"]) == ("text", 4, "ip", "notes")
        added = await client.request("search:notes", {"add": True, "fields": [{"text": "Owl pellets", "by": "me"}]})
        assert added.tensors[0].numpy().tolist() == [4]
        hits = await client.search("notes", "pellets", k=1)
        assert hits.payloads == [[{"text": "Owl pellets", "by": "me"}]]
        gone = await client.request("search:notes", {"delete": True}, tensors=[np.array([4], np.int64)])
        assert gone.body == {"deleted": 1} and (await client.search("notes", "pellets", k=1)).ids.tolist() == [[-1]]
        with pytest.raises(Refused, match="asked with text"):
            await client.search("notes", np.zeros((1, 4), np.float32))
        assert (await client.search("notes", "voles", k=1)).ids.tolist() == [[0]]

    async def main() -> None:
        async with cluster(Index(index=tmp_path / "notes"), inproc=True) as running:
            await body(running)

    asyncio.run(main())


def test_what_was_acknowledged_is_there_after_kill_9(tmp_path: Path) -> None:
    """Two askers add passages in threes; the server is killed five times at random moments."""
    build_text(tmp_path / "notes", name="notes", documents=DOCUMENTS)
    url, draw = free_url(), random.Random(7)
    acknowledged: dict[int, str] = {}

    async def add(client: object, asker: int, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            words = [f"asker{asker}word{number}part{part}" for part in range(3)]
            number += 1
            try:
                body = {"add": True, "fields": [{"text": word} for word in words]}
                reply = await client.request("search:notes", body, deadline=5)  # type: ignore[attr-defined]
            except RalmqError:
                return
            acknowledged.update(zip(reply.tensors[0].numpy().tolist(), words, strict=True))

    async def life(client: object, kill: bool) -> None:
        with worker(tmp_path, url, "index", index=tmp_path / "notes") as server:
            while True:
                try:
                    info = await client.request("search:notes", {"info": True}, wait_service=30)  # type: ignore[attr-defined]
                    break
                except RalmqError:
                    await asyncio.sleep(0.05)
            for text in draw.sample(sorted(acknowledged.values()), min(50, len(acknowledged))):
                [[number]] = (await client.search("notes", text, k=1)).ids.tolist()  # type: ignore[attr-defined]
                assert acknowledged[number] == text
            extra = info.body["ntotal"] - len(DOCUMENTS) - len(acknowledged)
            assert extra >= 0 and extra % 3 == 0, "a change is there whole or not at all"
            if not kill:
                return
            stop = asyncio.Event()
            before = len(acknowledged)
            askers = [asyncio.create_task(add(client, asker + 10 * before, stop)) for asker in range(2)]
            while len(acknowledged) < before + 30:
                await asyncio.sleep(draw.random() * 0.05)
            server.send(signal.SIGKILL)
            stop.set()
            await asyncio.wait(askers)

    async def main() -> None:
        with broker(tmp_path, url):
            async with connect(url, wait=30) as client:
                for round_ in range(6):
                    await life(client, kill=round_ < 5)
                texts = sorted(acknowledged.values())
                assert len(texts) >= 150

    asyncio.run(main())


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, text in DOCUMENTS:
        (tmp_path / "texts" / name).write_text(text)
    made = ralmq("index", "build", "notes", "texts", "--text", "--out", "made", home=tmp_path)
    assert made.returncode == 0 and "4 passages" in made.stdout, made.stderr
    (tmp_path / "worker").mkdir()
    with (
        running_broker(tmp_path) as url,
        started("worker", "index", "--broker", url, "-o", f"index={tmp_path / 'made'}", home=tmp_path / "worker"),
    ):
        ready = ("status", "--expect", "search:notes", "--broker", url)
        eventually(lambda: ralmq(*ready, home=tmp_path).returncode == 0)
        done = ralmq("search", "notes", "rye OR (bread", "--k", "1", "--json", "--broker", url, home=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["payloads"][0][0]["document"] == "texts/bread.txt"
        shown = ralmq("search", "notes", "barque", "--k", "1", "--broker", url, home=tmp_path)
        assert "two square rigged masts" in shown.stdout


def test_files_are_added_from_the_command_line(tmp_path: Path) -> None:
    """Texts to an index of texts, vectors to one of vectors; a line says which where it is the other."""
    build_text(tmp_path / "notes", name="notes", documents=DOCUMENTS)
    write_vectors(tmp_path / "plain", name="plain", vectors=np.eye(4, dtype=np.float32))
    (tmp_path / "gulls.txt").write_text(" ".join(["gulls"] * 150))
    (tmp_path / "lines.jsonl").write_text('{"text": "Terns dive", "by": "me"}\n{"text": "Skuas\u2028steal"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "Terns dive"}\n{"by": "me"}\n')
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "a.pdf").write_text("no text")
    np.save(tmp_path / "v.npy", np.zeros((1, 4), np.float32))
    np.save(tmp_path / "ids.npy", np.array([70, 80]))
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_text("")
    with running_broker(tmp_path) as url, contextlib.ExitStack() as stack:
        for name in ("notes", "plain"):
            (home := tmp_path / f"worker-{name}").mkdir()
            stack.enter_context(
                started("worker", "index", "--broker", url, "-o", f"index={tmp_path / name}", home=home)
            )
            eventually(lambda home=home: "serves search:" in (home / "out").read_text())

        def said(*arguments: str, code: int = 0) -> str:
            done = ralmq(*arguments, "--broker", url, home=tmp_path)
            assert done.returncode == code and (not code or done.stderr.count("\n") == 1), done.stderr
            return done.stderr if code else done.stdout

        assert "2 added: 4, 5" in said("index", "add", "notes", "gulls.txt")
        assert "2 added: 70, 80" in said("index", "add", "notes", "lines.jsonl", "--ids", "ids.npy")
        found = json.loads(said("search", "notes", "gulls", "--json", "--k", "3"))
        assert found["ids"] == [[4, 5, -1]] and found["payloads"][0][0]["document"] == "gulls.txt"
        assert json.loads(said("search", "notes", "terns skuas", "--json", "--k", "2"))["payloads"][0][0]["by"] == "me"
        assert said("search", "notes", "nowhere") == "nothing found\n"
        assert "score" in (shown := said("search", "notes", "gulls")) and "distance" not in shown
        place = said("index", "snapshot", "notes").strip().partition(": ")[2]
        assert Path(place).parent == tmp_path / "notes" / "snapshots" and is_text(Path(place))
        for asked, part in {
            ("index", "add", "notes", "v.npy"): "notes is an index of texts: add a .txt or a .jsonl file",
            ("index", "add", "notes", "bad.jsonl"): "bad.jsonl: line 2 has no text",
            ("index", "add", "notes", "none.jsonl"): "none.jsonl: holds no line",
            ("index", "add", "notes", "a.pdf"): "a.pdf: is no file that can be added; give .npy, .jsonl, .txt",
            ("index", "add", "notes", "gone.txt"): "gone.txt: no such file or folder",
            ("index", "add", "plain", "gulls.txt"): "plain holds vectors and names no encoder of texts: add a .npy",
            ("index", "add", "plain", "text.npy"): "text.npy: cannot be read as .npy; write float32 [n, d] with",
            ("index", "add", "plain", "empty.npy"): "empty.npy: cannot be read as .npy; write float32 [n, d] with",
            ("search", "notes", "v.npy"): "notes is an index of texts: ask it with words, not with a .npy file",
            ("search", "plain", "gulls"): "ask it with a .npy file of float32 [queries, 4], or build it with --encoder",
        }.items():
            line = said(*asked, code=2)
            assert part in line and "pickle" not in line
