"""`ralmq index create | add | delete | snapshot | use` as a user runs them."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from commands import broker, eventually, ralmq, started
from live_state import D, vectors
from ralmq.workers.index.manifest import read_manifest
from ralmq.workers.index.writer import write_vectors
from ralmq.workers.texts.files import build_text


def test_the_commands(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors(20))
    np.save(tmp_path / "q.npy", vectors(1))
    np.save(tmp_path / "ids.npy", np.arange(100, 120))
    (tmp_path / "f.jsonl").write_text("".join(f'{{"n": {row}}}\n' for row in range(20)))
    (tmp_path / "bad.jsonl").write_text('{"n": 1}\nno map\n')
    (tmp_path / "logs").mkdir()
    environment: dict[str, str] = {}

    def said(*arguments: str, code: int = 0) -> Any:
        done = ralmq(*arguments, home=tmp_path, environment=environment)
        assert done.returncode == code, done.stderr
        return done.stderr if code else json.loads(done.stdout) if "--json" in arguments else done.stdout

    assert "-o index=live" in said("index", "create", "docs", "--dim", str(D), "--out", "live", "--factory", "HNSW8")
    assert "is not empty" in said("index", "create", "docs", "--dim", str(D), "--out", "live", code=2)
    with (
        broker(tmp_path / "logs") as url,
        started("worker", "index", "-o", f"index={tmp_path / 'live'}", "--broker", url, home=tmp_path),
    ):
        environment["RALMQ_BROKER"] = url
        eventually(lambda: "serves search:docs" in (tmp_path / "out").read_text())
        given = ("--ids", "ids.npy", "--fields", "f.jsonl", "--json")
        assert said("index", "add", "docs", "v.npy", *given) == {"ids": list(range(100, 120))}
        assert "20 added: 120, 121" in said("index", "add", "docs", "v.npy")
        assert "id 100 is there already" in said("index", "add", "docs", "v.npy", "--ids", "ids.npy", code=2)
        assert "line 2 is no JSON map" in said("index", "add", "docs", "v.npy", "--fields", "bad.jsonl", code=2)
        assert "does not hold int64 [n]" in said("index", "add", "docs", "v.npy", "--ids", "v.npy", code=2)
        assert "no such file" in said("index", "add", "docs", "none.npy", code=2)
        assert said("index", "delete", "docs", "120", "7", "--json") == {"deleted": 1}
        found = said("search", "docs", "q.npy", "--k", "1", "--json")
        assert found["ids"] == [[100]] and found["payloads"] == [[{"n": 0}]]
        made = said("index", "snapshot", "docs", "--json")
        (version,) = made["versions"]
        (path,) = (tmp_path / "live" / "snapshots").iterdir()
        assert made["directories"] == [str(path)]
        assert said("index", "snapshot", "docs") == f"version {version}: {path}\n"
        before = version.rpartition("-")[0]
        lines = [f"search:docs: version {before} -> {version}", "1 of 1 servers changed", ""]
        assert said("index", "use", "docs", str(path)).split("\n") == lines
        assert said("search", "docs", "q.npy", "--k", "1", "--json")["payloads"] == [[{"n": 0}]]
        assert "takes no changes" in said("index", "delete", "docs", "100", code=2)
        assert "no such index directory" in said("index", "use", "docs", "nowhere", code=2)


def test_what_takes_the_place_of_an_index_is_alike(tmp_path: Path) -> None:
    """Dimension, metric and kind: askers were told those of the first one."""
    drawn = np.random.default_rng(3).normal(size=(40, 16)).astype(np.float32)
    write_vectors(tmp_path / "a", name="docs", vectors=drawn[:20, :8], factory="Flat")
    write_vectors(tmp_path / "b", name="docs", vectors=drawn[20:, :8], factory="HNSW8")
    write_vectors(tmp_path / "wide", name="docs", vectors=drawn, factory="Flat")
    write_vectors(tmp_path / "ip", name="docs", vectors=drawn[:, :8], factory="Flat", metric="ip")
    write_vectors(tmp_path / "made", name="docs", vectors=drawn[:, :8], factory="Flat", encoder="e")
    build_text(tmp_path / "words", name="words", documents=[("a.txt", "one two")])
    others = {"wide": "vectors of 16 dimensions, l2", "ip": "8 dimensions, ip", "made": "of e", "words": "texts"}
    with broker(tmp_path) as url, ExitStack() as stack:
        for number, (served, name) in enumerate((("a", "docs"), ("a", "docs"), ("words", "words"))):
            (home := tmp_path / f"worker-{number}").mkdir()
            stack.enter_context(
                started("worker", "index", "-o", f"index={tmp_path / served}", "--broker", url, home=home)
            )
            eventually(lambda home=home, name=name: f"serves search:{name}" in (home / "out").read_text())

        def use(name: str, directory: str) -> tuple[int, str]:
            done = ralmq("index", "use", name, directory, "--broker", url, home=tmp_path)
            assert done.returncode == 0 or done.stderr.count("\n") == 1
            return done.returncode, done.stdout or done.stderr

        for other, said in others.items():
            code, line = use("docs", other)
            assert code == 2 and f"{tmp_path / other}: holds " in line and said in line
            assert "search:docs serves vectors of 8 dimensions, l2:" in line and "-o name=" in line
        code, line = use("words", "a")
        assert code == 2 and "an index of texts is not exchanged" in line
        versions = [read_manifest(tmp_path / name).version for name in "ab"]
        code, lines = use("docs", "b")
        assert code == 0 and f"search:docs: version {versions[0]} -> {versions[1]}\n1 of 2 servers changed\n" in lines
        assert "start them anew with `-o index=b`" in lines


def test_servers_of_different_indexes_are_no_replicas(tmp_path: Path) -> None:
    drawn = np.random.default_rng(3).normal(size=(40, 16)).astype(np.float32)
    write_vectors(tmp_path / "a", name="docs", vectors=drawn[:20, :8], factory="Flat")
    write_vectors(tmp_path / "b", name="docs", vectors=drawn[20:, :8], factory="IVF2,Flat")
    build_text(tmp_path / "words", name="docs", documents=[("a.txt", "one two")])
    with broker(tmp_path) as url, ExitStack() as stack:
        for name in "ab":
            (home := tmp_path / f"worker-{name}").mkdir()
            stack.enter_context(
                started("worker", "index", "-o", f"index={tmp_path / name}", "--broker", url, home=home)
            )
            eventually(lambda home=home: "serves search:docs" in (home / "out").read_text())
        (home := tmp_path / "worker-words").mkdir()
        refused = ralmq("worker", "index", "-o", f"index={tmp_path / 'words'}", "--broker", url, home=home)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert "(vectors of 8 dimensions, l2; this one: texts)" in refused.stderr and "-o name=" in refused.stderr
        named = ("-o", f"index={tmp_path / 'words'}", "-o", "name=words")
        with started("worker", "index", *named, "--broker", url, home=home):
            eventually(lambda: "serves search:words" in (home / "out").read_text())
