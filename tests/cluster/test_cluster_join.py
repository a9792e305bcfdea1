"""`ralmq up FILE` and `ralmq join`, as users of two machines run them: here two state folders, over tcp with keys."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import eventually, ralmq, runs, started
from ralmq.cluster.site import SOON
from serving import free_url

FILE = """\
[cluster]
broker = "{url}"
keys = "keys"

[machines.desk]
memory = "24MiB"
speed = 4

[machines.lap]
memory = "16MiB"
speed = 4

[models.demo]
path = "demo"
kv_tokens = 256

[[workers]]
worker = "echo"
machine = "lap"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    done = ralmq("keys", "init", "keys", home=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "state" / "ralmq" / "local" / "cluster.json").read_text())
    return found


@contextmanager
def detached(*arguments: str, home: Path) -> Iterator[dict[str, Any]]:
    """A machine's part of a cluster in the background; its record. All of it is gone afterwards."""
    home.mkdir(exist_ok=True)
    done = ralmq(*arguments, "--detach", home=home)
    try:
        assert done.returncode == 0, done.stderr
        found = {**record_of(home), "said": done.stdout}
        yield found
    finally:
        ralmq("down", home=home)
    assert not any(runs(process["pid"]) for process in [*found["processes"], found])


def status(home: Path, url: str, keys: str = "keys") -> dict[str, Any]:
    environment = {"RALMQ_BROKER": url, **({"RALMQ_KEYS": str(home / keys)} if keys else {})}
    done = ralmq("status", "--json", home=home, environment=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def names(record: dict[str, Any]) -> list[str]:
    return [process["name"] for process in record["processes"]]


def test_two_machines_share_a_model_and_a_second_start_adds_what_is_new(home: Path) -> None:
    url = free_url()
    file = home / "cluster.toml"
    file.write_text(FILE.format(url=url))
    desk, lap, key = home / "desk", home / "lap", str(home / "keys" / "worker.key")
    up, join = ("up", str(file), "--machine", "desk"), ("join", url, "--machine", "lap", "--keys", key)
    with ExitStack() as stack:
        first = stack.enter_context(detached(*up, home=desk))
        assert names(first) == ["broker", "demo-cpu", "demo-generator"]
        assert f"on lap: ralmq join {url} --machine lap --keys worker.key" in first["said"]
        second = stack.enter_context(detached(*join, home=lap))
        assert names(second) == ["demo-cpu", "echo-0"]
        seen = status(home, url)
        assert [line["formed"] for line in seen["pipelines"]] == [True]
        spans = sorted(worker["layers"] for worker in seen["workers"] if "layers" in worker)
        assert len(spans) == 2 and spans[0][1] == spans[1][0]
        prompt = ("generate", "Return the sum", "--model", "demo", "--max-tokens", "4", "--json")
        done = ralmq(*prompt, home=home, environment={"RALMQ_BROKER": url, "RALMQ_KEYS": key})
        assert done.returncode == 0 and len(json.loads(done.stdout)["tokens"]) == 4, done.stderr
        see_nothing_new(up, desk, first)
        see_nothing_new(join, lap, second)
        see_what_is_added(file, up, desk)
        see_that_a_new_broker_is_told(url, desk, home)


def see_nothing_new(command: tuple[str, ...], home: Path, before: dict[str, Any]) -> None:
    done = ralmq(*command, home=home)
    assert done.returncode == 0 and "nothing is new" in done.stdout, done.stderr
    assert record_of(home)["processes"] == before["processes"]


def see_what_is_added(file: Path, up: tuple[str, ...], desk: Path) -> None:
    """New processes are started, changed ones go on, and what cannot be added is said."""
    before = record_of(desk)
    extra = '\n[[workers]]\nworker = "echo"\nname = "{name}"\nmachine = "desk"\noptions = {{ {option} = 1 }}\n'
    text = file.read_text().replace("kv_tokens = 256", "kv_tokens = 128")
    file.write_text(text + extra.format(name="late", option="delay_ms"))
    done = ralmq(*up, home=desk)
    assert done.returncode == 0 and "added late" in done.stdout, done.stderr
    assert "demo-cpu goes on as it was started" in done.stdout or "kv_mib" not in done.stdout
    now = record_of(desk)
    assert now["processes"][:-1] == before["processes"] and names(now)[-1] == "late"
    file.write_text(file.read_text() + extra.format(name="wrong", option="delayms"))
    done = ralmq(*up, home=desk)
    assert done.returncode == 2 and "echo has no option delayms: did you mean delay_ms?" in done.stderr
    assert f"{file}:{len(file.read_text().splitlines())}: " in done.stderr and done.stderr.count("\n") == 1


def see_that_a_new_broker_is_told(url: str, desk: Path, home: Path) -> None:
    """The plan is soft state of the broker, and there for who joins after it was lost."""
    old = record_of(desk)["processes"][0]
    os.kill(old["pid"], signal.SIGKILL)
    third, key = home / "third", str(home / "keys" / "worker.key")
    third.mkdir()

    def told() -> bool:
        done = ralmq("join", url, "--machine", "nobody", "--keys", key, home=third)
        return "the cluster file has no machine nobody: say --machine with one of desk, lap" in done.stderr

    eventually(told)


def test_a_key_that_is_wrong_is_told_in_one_line(home: Path) -> None:
    url = free_url()
    (home / "cluster.toml").write_text(FILE.format(url=url))
    other = ralmq("keys", "init", "other", home=home)
    assert other.returncode == 0
    (home / "keys" / "client.key").chmod(0o644)
    with detached("up", str(home / "cluster.toml"), "--machine", "desk", home=home / "desk"):
        for keys, said in (
            ((), "lets nobody in without a key"),
            (("--keys", "other/worker.key"), "has another key than the file says"),
            (("--keys", "keys/client.key"), "chmod 600"),
            (("--keys", "keys/none.key"), "name a key file"),
        ):
            done = ralmq("join", url, "--machine", "lap", *keys, home=home)
            assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
        (home / "keys" / "client.key").chmod(0o600)
        done = ralmq("join", url, "--machine", "lap", "--keys", "keys/client.key", home=home)
        assert done.returncode == 2 and "may not ask ralmq.cluster" in done.stderr


def test_a_wrong_key_in_the_file_is_told_with_its_line(home: Path) -> None:
    text = FILE.format(url=free_url())
    for keys, said in (("none", "name a key file"), ("keys/worker.key", "a broker needs the folder")):
        (home / "cluster.toml").write_text(text.replace('keys = "keys"', f'keys = "{keys}"'))
        done = ralmq("up", "cluster.toml", "--machine", "desk", home=home)
        assert done.returncode == 2 and "cluster.toml:3: " in done.stderr and said in done.stderr, done.stderr
    (home / "cluster.toml").write_text(text.replace("127.0.0.1", "0.0.0.0").replace('keys = "keys"\n', ""))
    done = ralmq("up", "cluster.toml", "--machine", "desk", home=home)
    assert done.returncode == 2 and "is open to other machines: make keys" in done.stderr


def test_a_machine_offers_what_it_has_where_there_is_no_file(home: Path) -> None:
    url = free_url()
    with detached("up", "--bind", url, "--stages", "2", "--model", "demo", home=home / "desk") as first:
        stage = next(process for process in first["processes"] if process["name"] == "stage-1")
        done = ralmq("join", url, "--machine", "lap", home=home)
        assert (
            done.returncode == 2
            and "has no cluster file: start it with `ralmq up FILE`, or join with --model" in done.stderr
        )
        more = detached("join", url, "--model", "demo", "--memory", "24MiB", "--speed", "3", home=home / "lap")
        with more as joined:
            assert names(joined) == ["demo-cpu"]
            os.kill(first["pid"], signal.SIGSTOP)  # nobody starts the stage again
            try:
                os.kill(stage["pid"], signal.SIGKILL)
                eventually(lambda: [3, 6, 6] in [w.get("layers") for w in status(home, url, "")["workers"]])
                eventually(lambda: all(line["formed"] for line in status(home, url, "")["pipelines"]))
            finally:
                os.kill(first["pid"], signal.SIGCONT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "cluster.toml", "--stages", "3"), "what to start is in cluster.toml"),
        (("up", "--machine", "desk"), "name the file, too"),
        (("up", "nothing.toml"), "name a cluster file"),
        (("join", "tcp://127.0.0.1:1", "--memory", "1GiB"), "--model"),
        (("join", "tcp://127.0.0.1:1", "--model", "demo", "--machine", "x"), "without a cluster file"),
        (("join", "tcp://127.0.0.1:1", "--path", "demo"), "MODEL=DIR"),
        (("join", "tcp://127.0.0.1:1", "--path", "demo=.", "--file", "cluster.toml"), "a file says it as models = {"),
        (("join", "tcp://127.0.0.1:1", "--path", "demo=.", "--model", "demo"), "a file says it as models = {"),
        (("join", "127.0.0.1"), "give tcp://host:port"),
        (("join", "tcp://127.0.0.1:1", "--model", "demo", "--memory", "lots"), "no amount of memory"),
    ],
)
def test_options_that_make_no_sense_are_refused(home: Path, arguments: tuple[str, ...], said: str) -> None:
    done = ralmq(*arguments, home=home)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


ECHO = '[cluster]\nbroker = "{url}"\n[machines.desk]\n[machines.lap]\n[[workers]]\nworker = "echo"\nmachine = "lap"\n'
MORE = '[[workers]]\nworker = "echo"\nname = "{name}"\noptions = {{ {option} = 1 }}\n'


def test_a_process_that_cannot_start_does_not_stand_in_the_way_of_the_next_try(tmp_path: Path) -> None:
    """Two are added, of which one is wrong; it is mended, and the other one has gone on meanwhile."""
    url, file = free_url(), tmp_path / "my cluster.toml"
    file.write_text(text := ECHO.format(url=url))
    up = ("up", str(file), "--machine", "desk")
    with detached(*up, home=tmp_path / "desk") as first:
        assert names(first) == ["broker"]
        wrong = MORE.format(name="bad", option="delay_ms").replace('"echo"', '"no.such:Thing"')
        file.write_text(text + MORE.format(name="good", option="delay_ms") + wrong)
        done = ralmq(*up, home=tmp_path / "desk")
        assert done.returncode == 2 and "cannot import no.such" in done.stderr, done.stderr
        good = record_of(tmp_path / "desk")["processes"][1]
        assert good["name"] == "good" and runs(good["pid"])
        file.write_text(text + MORE.format(name="good", option="delay_ms") + MORE.format(name="bad", option="delay_ms"))
        done = ralmq(*up, home=tmp_path / "desk")
        assert done.returncode == 0 and done.stdout == "added bad\n", done.stderr
        now = record_of(tmp_path / "desk")["processes"]
        assert now[1] == good and now[2]["name"] == "bad" and runs(now[2]["pid"])
        done = ralmq(*up, home=tmp_path / "desk")
        assert done.returncode == 0 and "nothing is new" in done.stdout


def test_who_joins_before_the_cluster_is_up_waits_for_it(tmp_path: Path) -> None:
    """Longer than a broker that is there is given to be told its file."""
    url, file, lap = free_url(), tmp_path / "cluster.toml", tmp_path / "lap"
    file.write_text(ECHO.format(url=url))
    lap.mkdir()
    with started("join", url, "--machine", "lap", home=lap) as joining:
        time.sleep(SOON + 1)
        assert joining.poll() is None
        with detached("up", str(file), "--machine", "desk", home=tmp_path / "desk"):
            eventually(lambda: "ready at" in (lap / "out").read_text() or joining.poll() is not None)
            assert names(record_of(lap)) == ["echo-0"], (lap / "out").read_text()
            os.kill(joining.pid, signal.SIGINT)
            assert joining.wait(60) == 0


SLOW = """\
[cluster]
broker = "{url}"
[machines.desk]
memory = "48MiB"
speed = 100
[machines.lap]
memory = "48MiB"
speed = 0.01
[models.demo]
path = "demo"
kv_tokens = 100
"""


def test_a_machine_without_layers_is_said_on_both(tmp_path: Path) -> None:
    url, file, lap = free_url(), tmp_path / "cluster.toml", tmp_path / "lap"
    file.write_text(SLOW.format(url=url))
    with detached("up", str(file), "--machine", "desk", home=tmp_path / "desk") as up:
        assert "lap gets no layers of demo: one layer would be slower" in up["said"] and "on lap:" not in up["said"]
        assert up["said"].endswith(f"ready at {url}\n")
        with detached("join", url, "--machine", "lap", home=lap) as joined:
            assert joined["processes"] == []
            assert "nothing runs here: the cluster has no layers and no workers for lap" in joined["said"]


def test_ready_is_said_once_the_stages_that_ask_have_their_layers(tmp_path: Path) -> None:
    """Before that it is said what waits; both sides say it, and neither waits before it is up."""
    url, file, lap = free_url(), tmp_path / "cluster.toml", tmp_path / "lap"
    file.write_text(SLOW.format(url=url).replace('memory = "48MiB"\n', ""))  # so the broker splits it
    lap.mkdir()
    with detached("up", str(file), "--machine", "desk", home=tmp_path / "desk") as up:
        assert up["said"].endswith(f"up at {url}, not ready yet: demo-cpu waits for its layers\n")
        with started("join", url, "--machine", "lap", home=lap):
            logs = [lap / "out", tmp_path / "desk" / "state" / "ralmq" / "local" / "supervisor.log"]
            for log in logs:
                eventually(lambda log=log: "all layers are there" in log.read_text())
            assert [line["formed"] for line in status(tmp_path, url, keys="")["pipelines"]][:1] == [True]
