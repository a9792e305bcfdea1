"""Bad input: exit code 2, nothing on stdout, one line on stderr that names what to mend."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from commands import bound_address, env_of, eventually, ralmq, started
from ralmq.cli.main import app
from serving import free_url
from typer.testing import CliRunner

CASES = {
    "no such command": (["fly"], "No such command 'fly'"),
    "no such option": (["up", "--wings", "2"], "No such option: --wings"),
    "a missing argument": (["search", "--k", "2"], "Missing argument"),
    "no prompt": (["generate", "--model", "demo"], "give a prompt, or --prompts FILE"),
    "two prompts": (
        ["generate", "a", "--model", "m", "--prompts", "t.txt"],
        "give a prompt, or --prompts FILE, not both",
    ),
    "a bias of no token": (
        ["generate", "a", "--model", "m", "--logit-bias", "x=1"],
        "--logit-bias x=1: give a token id",
    ),
    "parameters of a hook": (["generate", "a", "--model", "m", "--hook", "h=[1]"], "parameters as a JSON object"),
    "a missing file of prompts": (
        ["generate", "--model", "m", "--prompts", "gone.jsonl"],
        "gone.jsonl: cannot be read",
    ),
    "an option of another type": (["search", "docs", "text", "--k", "many"], "'--k': Input should be a valid integer"),
    "an unknown policy": (["generate", "a", "--model", "m", "--retrieve", "d", "--policy", "magic"], "magic"),
    "a stride without an index": (["generate", "a", "--model", "m", "--stride", "4"], "--stride without --retrieve"),
    "retrieval options alone": (["generate", "a", "--model", "m", "--interval", "2"], "--interval without --retrieve"),
    "an open address": (["broker", "--bind", "tcp://0.0.0.0:0"], "add --insecure"),
    "an open address by name": (["up", "--bind", "tcp://example.org:0"], "add --insecure"),
    "any interface": (["broker", "--bind", "tcp://*:0"], "add --insecure"),
    "no address": (["broker", "--bind", "127.0.0.1:5555"], "no address that a broker binds"),
    "no port": (["broker", "--bind", "tcp://127.0.0.1"], "no address that a broker binds"),
    "a port that cannot be bound": (["broker", "--bind", "tcp://127.0.0.1:99999"], "no address that a broker binds"),
    "no host": (["up", "--bind", "tcp://:5555"], "no address that a broker binds"),
    "more stages than layers": (["up", "--stages", "99"], "--stages 99: demo has 6 layers; give 1 to 6"),
    "an option without -o": (["worker", "echo", "delay_ms=3"], "delay_ms=3 is an option of the worker: write -o delay"),
    "an option without a name": (
        ["worker", "echo", "-o", "=3"],
        "-o =3 is no key=value: write one of the options that",
    ),
    "an unknown worker": (["worker", "nobody"], "no worker is called nobody: there are echo, stage"),
    "a module that is not there": (["worker", "no.such:Thing"], "cannot import no.such"),
    "a class that is no worker": (["worker", "json:JSONDecoder"], "no subclass of ralmq.Worker"),
    "an unknown worker option": (["worker", "echo", "-o", "speed=1"], "no option speed: there are delay_ms"),
    "a worker option of another type": (["worker", "echo", "-o", "delay_ms=soon"], "-o delay_ms=soon"),
    "no key=value": (["worker", "echo", "-o", "delay_ms"], "no key=value"),
    "an option given twice": (
        ["worker", "module", "-o", "name=a", "-o", "allow=a:A", "-o", "allow=b:B"],
        "-o allow is given twice: give it once; several values have commas between them",
    ),
    "no address of a broker": (["worker", "echo", "--broker", "nowhere"], "no broker address"),
    "no address, before a model is loaded": (
        ["worker", "stage", "-o", "model=demo", "-o", "stage=0/1", "--broker", "127.0.0.1:5555"],
        "127.0.0.1:5555 is no broker address: did you mean tcp://127.0.0.1:5555?",
    ),
    "another scheme": (["status", "--broker", "http://localhost:80"], "did you mean tcp://localhost:80?"),
    "a port that cannot be": (["generate", "a", "--model", "m", "--broker", "tcp://h:70000"], "give tcp://host:port"),
    "an address to bind": (["join", "tcp://*:5555"], "tcp://*:5555 is no broker address"),
    "no keys, before a model is loaded": (
        ["worker", "stage", "-o", "model=demo", "-o", "stage=0/1", "--keys", "gone"],
        "gone: No such file or directory: name a key file",
    ),
    "a missing model directory": (["worker", "stage", "-o", "model=gone", "-o", "stage=0/2"], "gone: no such model"),
    "a directory without a model": (["worker", "generator", "-o", "model=."], "holds no config.json"),
    "an encoder given as a language model": (
        ["worker", "stage", "-o", "model=encoder", "-o", "stage=0/1"],
        "'bert' is an encoder, which generates no text: serve it with `ralmq worker encoder -o model=",
    ),
    "an encoder to be planned": (["plan", "--model", "encoder", "--worker", "a=1GiB,1"], "is an encoder, which"),
    "an encoder to be started": (["up", "--model", "encoder", "--bind", "tcp://127.0.0.1:*"], "is an encoder, which"),
    "an encoder to be joined with": (["join", "tcp://h:1", "--model", "encoder"], "is an encoder, which"),
    "an encoder of another kind": (
        ["plan", "--model", "distil", "--worker", "a=1GiB,1"],
        "and `ralmq worker encoder` serves those of bert, roberta, xlm-roberta, camembert alone",
    ),
    "an encoder to score texts": (
        ["index", "build", "a", "t.txt", "--model", "encoder", "--out", "o"],
        "is an encoder, no language model; give it as --encoder encoder",
    ),
    "devices that are not there": (
        ["worker", "stage", "-o", "model=demo", "-o", "stage=0/1", "-o", "tp=2", "-o", "device=cuda:70"],
        "device=cuda:70 cannot be used",
    ),
    "a missing index": (["worker", "index", "-o", "index=gone"], "gone: no such index directory"),
    "a missing source": (["index", "build", "a", "gone", "--model", "plain", "--out", "o"], "gone: no such file"),
    "a model without a tokenizer": (
        ["index", "build", "a", "t.txt", "--model", "bare", "--out", "o"],
        "tokenizer.json",
    ),
    "a missing vector file": (["search", "docs", "gone.npy"], "gone.npy: no such file"),
    "a file of objects": (["search", "docs", "objects.npy"], "cannot be read as .npy"),
    "a text file called .npy": (["search", "docs", "text.npy"], "cannot be read as .npy"),
    "no logs": (["logs", "stage-0"], "no log of stage-0"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each broken file."""
    home = tmp_path_factory.mktemp("home")
    for name in ("bare", "plain"):
        (home / name).mkdir()
        (home / name / "config.json").write_text("{}")
    (home / "plain" / "tokenizer.json").write_text("{}")
    for name, kind in (("encoder", "bert"), ("distil", "distilbert")):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 8}))
    (home / "t.txt").write_text("text")
    (home / "text.npy").write_text("no array")
    (home / "objects.npy").write_bytes(_object_array(home))
    return home


def _object_array(home: Path) -> bytes:
    """A .npy file whose header says that objects follow, as numpy would unpickle them."""
    np.save(home / "whole.npy", np.zeros(1, np.int64))
    return (home / "whole.npy").read_bytes().replace(b"'<i8'", b"'|O' ")


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_what_to_mend(case: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    arguments, part = CASES[case]
    if arguments[0] == "worker":
        done = ralmq(*arguments, home=home)
        code, out, line = done.returncode, done.stdout, done.stderr
    else:
        result = CliRunner(env=env_of(home)).invoke(app, arguments)
        code, out, line = result.exit_code, result.stdout, result.stderr
    assert (code, out) == (2, "")
    assert part in line
    assert line.startswith("ralmq: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("keys", "init"), ("split", "demo", "--stages", "2"), ("index", "create", "i", "--dim", "2", "--out")]
)
def test_a_place_where_nothing_can_be_made(arguments: tuple[str, ...], home: Path) -> None:
    """The system's own word, and what to do about it."""
    done = ralmq(*arguments, "/proc/nobody/x", home=home)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ralmq: /proc/nobody: No such file or directory: name another place, one that is there\n"
    )


def test_who_joins_hears_what_is_waited_for(tmp_path: Path) -> None:
    url = free_url()
    with started("join", url, "--machine", "m", home=tmp_path):
        eventually(lambda: f"ralmq: waiting: the broker at {url} has not answered" in (tmp_path / "out").read_text())


def test_an_unreadable_checkpoint(home: Path) -> None:
    broken = home / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{no json")
    done = ralmq("worker", "stage", "-o", "model=broken", "-o", "stage=0/1", home=home)
    assert done.returncode == 2
    assert "config.json" in done.stderr and done.stderr.count("\n") == 1


def test_a_broken_manifest(home: Path) -> None:
    folder = home / "index"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format": 99}))
    done = ralmq("worker", "index", "-o", "index=index", home=home)
    assert done.returncode == 2
    assert "manifest.json" in done.stderr and done.stderr.count("\n") == 1


def test_up_passes_the_line_of_its_process_on(home: Path) -> None:
    done = ralmq("up", "--bind", "tcp://127.0.0.1:*", "--model", "gone", home=home)
    assert done.returncode == 2
    assert "gone: no such model directory" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("broker",), ("up",), ("up", "--detach")])
def test_a_port_in_use(arguments: tuple[str, ...], home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = ralmq(*arguments, "--bind", address, home=home)
    assert done.returncode == 2
    assert f"{address} is taken" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_service_is_bad_input_and_no_broker_is_not(tmp_path: Path) -> None:
    with started("broker", "--bind", "tcp://127.0.0.1:*", home=tmp_path) as broker:
        url = eventually(lambda: bound_address(tmp_path))
        for arguments in (["generate", "a", "--model", "none"], ["search", "none", "text"]):
            done = ralmq(*arguments, "--broker", url, home=tmp_path)
            assert (done.returncode, done.stdout) == (2, "")
            assert "none" in done.stderr and done.stderr.count("\n") == 1
        broker.terminate()
        broker.wait()
    done = ralmq("generate", "a", "--model", "none", "--broker", url, home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no broker answers" in done.stderr and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(home: Path) -> None:
    done = ralmq("--debug", "worker", "nobody", home=home)
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "Refused" in done.stderr
