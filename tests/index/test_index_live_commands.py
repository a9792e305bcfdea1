"""`ralmq index create | add | delete | snapshot | use` as a user runs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from commands import broker, eventually, ralmq, started
from live_state import D, vectors


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
        (version,) = said("index", "snapshot", "docs", "--json")["versions"]
        (path,) = (tmp_path / "live" / "snapshots").iterdir()
        assert said("index", "use", "docs", str(path)) == f"version {version}\n"
        assert said("search", "docs", "q.npy", "--k", "1", "--json")["payloads"] == [[{"n": 0}]]
        assert "takes no changes" in said("index", "delete", "docs", "100", code=2)
        assert "no such index directory" in said("index", "use", "docs", "nowhere", code=2)
