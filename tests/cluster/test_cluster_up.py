"""`index build`, `up`, `status`, `generate`, `search`, `logs`, `down` on the embedded model, as a user runs them."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import eventually, ralmq, runs, started

SERVICES = {"lm:demo", "generate:demo", "embed:demo", "search:notes"}
PROCESSES = ["broker", "stage-0", "stage-1", "generator", "index"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index over a few texts, built by the command, which starts and ends its own cluster."""
    home = tmp_path_factory.mktemp("up")
    (home / "notes").mkdir()
    for number in range(4):
        text = f"Note {number}: return the sum of the elements along axis {number}.\n" * 8
        (home / "notes" / f"{number}.txt").write_text(text)
    options = ("--model", "demo", "--out", "index", "--max-tokens", "300")
    done = ralmq("index", "build", "notes", "notes", *options, home=home, environment={"TMPDIR": str(home)})
    assert done.returncode == 0, done.stderr
    assert "entries" in done.stdout and "--index index" in done.stdout
    assert "score" in done.stderr  # the bars
    manifest = json.loads((home / "index" / "manifest.json").read_text())
    assert (manifest["name"], manifest["model"]) == ("notes", "demo")
    assert list(home.glob("ralmq-*")) == []
    return home


def test_a_cluster_in_the_background(home: Path) -> None:
    done = ralmq("up", "--detach", "--bind", "tcp://127.0.0.1:*", "--index", "index", home=home)
    try:
        assert done.returncode == 0, done.stderr
        assert "ready at tcp://127.0.0.1:" in done.stdout
        assert all(name in done.stdout for name in PROCESSES)
        record = json.loads((home / "state" / "ralmq" / "local" / "cluster.json").read_text())
        assert [process["name"] for process in record["processes"]] == PROCESSES
        url = {"RALMQ_BROKER": record["url"]}
        see_status(home)
        see_texts(home, url)
        see_neighbours(home, url)
        again = ralmq("up", "--bind", "tcp://127.0.0.1:*", home=home)
        assert again.returncode == 2 and "up already" in again.stderr and again.stderr.count("\n") == 1
        logs = ralmq("logs", "stage-1", home=home)
        assert logs.returncode == 0 and all(line.startswith("stage-1 | ") for line in logs.stdout.splitlines())
    finally:
        ended = ralmq("down", home=home)
    assert (ended.returncode, ended.stdout) == (0, "ended\n")
    assert not any(runs(process["pid"]) for process in [*record["processes"], record])
    assert not (home / "state" / "ralmq" / "local" / "cluster.json").exists()
    assert ralmq("down", home=home).stdout == "no cluster is up\n"
    assert "index | " in ralmq("logs", home=home).stdout


def document(home: Path, *arguments: str, environment: dict[str, str] | None = None) -> Any:
    """The one JSON document that a command prints."""
    done = ralmq(*arguments, "--json", home=home, environment=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def see_status(home: Path) -> None:
    """It finds the cluster by its record."""
    found = document(home, "status")
    assert set(found["services"]) >= SERVICES
    assert {worker["state"] for worker in found["workers"]} == {"ready"}
    layers = sorted(worker["layers"] for worker in found["workers"] if "layers" in worker)
    assert layers[0][0] == 0 and layers[0][1] == layers[1][0] and layers[1][1] == layers[1][2]
    assert [line["formed"] for line in found["pipelines"]] == [True]
    assert ralmq("status", "--expect", "lm:demo", home=home).returncode == 0
    missing = ralmq("status", "--expect", "lm:other", home=home)
    assert missing.returncode == 1 and "no worker offers lm:other" in missing.stderr


def see_texts(home: Path, url: dict[str, str]) -> None:
    prompt = ("generate", "Return the sum of", "--model", "demo", "--max-tokens", "6")
    plain = document(home, *prompt, environment=url)
    assert set(plain) == {"text", "tokens", "finish_reason", "usage"}
    assert len(plain["tokens"]) == plain["usage"]["completion_tokens"] <= 6
    shown = ralmq(*prompt, home=home, environment=url)
    assert shown.returncode == 0 and shown.stdout == plain["text"] + "\n"
    knn = document(
        home, *prompt, "--retrieve", "notes", "--interval", "2", "--staleness", "1", "--k", "4", environment=url
    )
    assert knn["passages"] and len(knn["passages"][0]["passages"]) == 4
    without = document(home, *prompt, "--retrieve", "notes", "--knn-lambda", "0", environment=url)
    assert without["tokens"] == plain["tokens"]
    long = ralmq("generate", "word " * 3000, "--model", "demo", home=home, environment=url)
    assert long.returncode == 2 and "context" in long.stderr and long.stderr.count("\n") == 1


def see_neighbours(home: Path, url: dict[str, str]) -> None:
    hits = document(home, "search", "notes", "return the sum", "--k", "3", environment=url)
    assert np.shape(hits["ids"]) == np.shape(hits["distances"]) == (1, 3)
    assert all(payload["document"].startswith("notes/") for payload in hits["payloads"][0])
    np.save(home / "two.npy", np.zeros((2, 256), np.float32))
    assert np.shape(document(home, "search", "notes", "two.npy", "--k", "2", environment=url)["ids"]) == (2, 2)
    np.save(home / "odd.npy", np.zeros((2, 3), np.float32))
    odd = ralmq("search", "notes", "odd.npy", home=home, environment=url)
    assert odd.returncode == 2 and "256" in odd.stderr and odd.stderr.count("\n") == 1


def said(home: Path) -> str:
    """What a command in the background has written so far."""
    return (home / "out").read_text()


def test_each_shard_of_an_index_gets_a_server(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    np.save(tmp_path / "q.npy", vectors[7:8])
    built = ralmq("index", "build", "parts", "v.npy", "--out", "parts", "--shards", "2", home=tmp_path)
    assert "serve it with `ralmq up --index parts`" in built.stdout
    done = ralmq("up", "--detach", "--stages", "1", "--bind", "tcp://127.0.0.1:*", "--index", "parts", home=tmp_path)
    try:
        assert done.returncode == 0, done.stderr
        assert "search:parts/0" in done.stdout and "search:parts/1" in done.stdout
        url = json.loads((tmp_path / "state" / "ralmq" / "local" / "cluster.json").read_text())["url"]
        found = ralmq("search", "parts", "q.npy", "--k", "1", "--json", "--broker", url, home=tmp_path)
        assert json.loads(found.stdout)["ids"] == [[7]] and json.loads(found.stdout)["shards"] == [2, 2]
    finally:
        ralmq("down", home=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_in_the_foreground_ends_with_its_supervisor(number: signal.Signals, tmp_path: Path) -> None:
    options = ("--bind", "tcp://127.0.0.1:*", "--stages", "1")
    with started("up", *options, home=tmp_path) as supervisor:
        eventually(lambda: "ready at" in (tmp_path / "out").read_text() or supervisor.poll() is not None)
        record = json.loads((tmp_path / "state" / "ralmq" / "local" / "cluster.json").read_text())
        pids = [process["pid"] for process in record["processes"]]
        assert record["pid"] == supervisor.pid and all(map(runs, pids))
        os.kill(supervisor.pid, number)
        assert supervisor.wait(60) == (0 if number == signal.SIGINT else -number)
    eventually(lambda: not any(map(runs, pids)))
    assert ralmq("down", home=tmp_path).stdout == "no cluster is up\n"


def test_lost_processes_are_started_again_the_broker_too(tmp_path: Path) -> None:
    with started("up", "--bind", "tcp://127.0.0.1:*", "--stages", "1", home=tmp_path) as supervisor:
        eventually(lambda: "ready at" in said(tmp_path) or supervisor.poll() is not None)
        state = tmp_path / "state" / "ralmq" / "local" / "cluster.json"
        first = json.loads(state.read_text())
        pids = {process["name"]: process["pid"] for process in first["processes"]}
        for name in ("generator", "broker", "stage-0"):
            os.kill(pids[name], signal.SIGKILL)
            eventually(lambda name=name: f"{name} was killed by signal 9" in said(tmp_path))
            eventually(lambda name=name: f"{name} was started again" in said(tmp_path))
        assert supervisor.poll() is None
        record = json.loads(state.read_text())
        assert record["url"] == first["url"]
        assert {p["name"] for p in record["processes"]} == set(pids)
        assert all(process["pid"] != pids[process["name"]] and runs(process["pid"]) for process in record["processes"])
        url = {"RALMQ_BROKER": record["url"]}
        eventually(lambda: ralmq("generate", "x", "--model", "demo", home=tmp_path, environment=url).returncode == 0)
        os.kill(supervisor.pid, signal.SIGINT)
        assert supervisor.wait(60) == 0
    assert not any(runs(process["pid"]) for process in record["processes"])


def test_down_ends_a_supervisor_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process takes no SIGTERM; `down` has its bound, which is shortened here."""
    from ralmq.cli import local

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(local, "DOWN_WITHIN", 0.5)
    options = ("--bind", "tcp://127.0.0.1:*", "--stages", "1")
    with started("up", *options, home=tmp_path) as supervisor:
        eventually(lambda: "ready at" in (tmp_path / "out").read_text() or supervisor.poll() is not None)
        os.kill(supervisor.pid, signal.SIGSTOP)
        local.down()
        assert supervisor.wait(60) == -signal.SIGKILL


def test_ctrl_c_of_a_build_leaves_nothing(home: Path, tmp_path: Path) -> None:
    where = {"TMPDIR": str(tmp_path)}
    arguments = ("index", "build", "x", str(home / "notes"), "--model", "demo", "--out", "made")
    with started(*arguments, home=tmp_path, environment=where) as build:
        eventually(lambda: list(tmp_path.glob("ralmq-*/stage-0.log")))
        eventually(lambda: subprocess.run(["pgrep", "-P", str(build.pid)], capture_output=True).stdout)
        children = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(build.pid)]).split()]
        build.send_signal(signal.SIGINT)
        assert build.wait(60) == 130
    assert children and not any(map(runs, children))
    assert list(tmp_path.glob("ralmq-*")) == [] and not (tmp_path / "made").exists()
