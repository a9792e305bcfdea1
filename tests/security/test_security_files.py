"""`ralmq keys` and its files: who may read them, what is refused, and that nothing else makes a key."""

import ast
import asyncio
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import ralmq
from ralmq.cli import keys as changing
from ralmq.cli import serve
from ralmq.errors import Refused
from ralmq.schema.keys import broker_key, key_for, read_entries

ROOT = Path(__file__).parents[2]
ROOMS = ("schema", "broker", "client", "workers", "cluster", "demo", "bench", "cli")


def test_only_the_owner_reads_what_init_makes(keys: Path) -> None:
    assert {path.name for path in keys.iterdir()} == {
        "admin.key",
        "allowed.json",
        "broker.key",
        "client.key",
        "worker.key",
    }
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()} == {0o600}


def test_no_secret_is_in_the_list_or_in_what_is_printed(keys: Path, tmp_path: Path) -> None:
    secrets = [json.loads(path.read_text())["secret"] for path in keys.glob("*.key")]
    assert len(set(secrets)) == 4
    listed = ralmq("keys", "list", "--keys", str(keys), home=tmp_path)
    shown = (keys / "allowed.json").read_text() + listed.stdout + listed.stderr
    as_json = ralmq("keys", "list", "--json", "--keys", str(keys), home=tmp_path)
    assert [entry["name"] for entry in json.loads(as_json.stdout)] == ["client", "worker", "admin"]
    key = key_for("tcp://127.0.0.1:1", keys, works=True)
    shown += as_json.stdout + repr(broker_key(keys)) + repr(key)
    assert not [secret for secret in secrets if secret in shown]


def test_the_keys_of_a_name_come_and_go(keys: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = ralmq("keys", *arguments, "--keys", str(keys), home=tmp_path)
        return done.stdout if done.returncode == 0 else f"{done.returncode}: {done.stderr}"

    assert "eve.key" in run("add", "eve")
    first = read_entries(keys)[-1]
    assert (first.name, first.role, first.revoked) == ("eve", "client", False)
    assert run("add", "eve").startswith("2: ralmq: a key eve is let in already")
    assert "revoked" in run("revoke", "eve")
    assert not (keys / "eve.key").exists()
    assert [entry.revoked for entry in read_entries(keys)] == [False, False, False, True]
    assert run("revoke", "eve").startswith("2: ralmq: no key eve is let in: there are client, worker, admin")
    assert "eve.key" in run("add", "eve", "--role", "worker", "--offers", "search:*")
    again = read_entries(keys)[-1]
    assert again.public != first.public and again.offers == ("search:*",) and len(read_entries(keys)) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "keys"], "has keys already"),
        (["add", "../x", "--keys", "keys"], "is no name of a key"),
        (["add", "broker", "--keys", "keys"], "is no name of a key"),
        (["add", "x", "--role", "king", "--keys", "keys"], "king is no role: there are client, worker, admin"),
        (["add", "x", "--offers", "a", "--keys", "keys"], "--offers is for workers"),
        (["list", "--keys", "gone"], "gone/broker.key: No such file"),
        (["list"], "No such file"),
    ],
)
def test_bad_input_is_refused_in_one_line(keys: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = ralmq("keys", *arguments, home=tmp_path, environment={"XDG_CONFIG_HOME": str(tmp_path / "config")})
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_commands_at_the_same_time_undo_nothing(keys: Path) -> None:
    names = [f"peer{number}" for number in range(12)]
    with ThreadPoolExecutor(len(names) + 1) as pool:
        done = [pool.submit(changing.add, name, "client", None, keys) for name in names]
        done.append(pool.submit(changing.revoke, "client", keys))
    assert not [each.exception() for each in done if each.exception()]
    assert {entry.name for entry in read_entries(keys) if not entry.revoked} == {"worker", "admin", *names}
    assert {path.stem for path in keys.glob("peer*.key")} == set(names)


def test_init_with_keep_changes_nothing(keys: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in keys.iterdir()}
    assert ralmq("keys", "init", "--keep", str(keys), home=tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in keys.iterdir()} == before


def test_a_secret_that_others_may_read_is_not_used(keys: Path) -> None:
    (keys / "worker.key").chmod(0o640)
    with pytest.raises(Refused, match="chmod 600"):
        key_for("tcp://127.0.0.1:1", keys, works=True)
    (keys / "broker.key").chmod(0o604)
    with pytest.raises(Refused, match="chmod 600"):
        broker_key(keys)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"public": 1}', "\x00", "[" * 100_000, '{"public": "short"}'])
def test_a_broken_file_is_refused(keys: Path, text: str) -> None:
    for name in ("client.key", "broker.key", "allowed.json"):
        (keys / name).write_text(text)
    with pytest.raises(Refused, match=r"client\.key"):
        key_for("tcp://127.0.0.1:1", keys / "client.key", works=False)
    with pytest.raises(Refused, match=r"broker\.key"):
        broker_key(keys)
    with pytest.raises(Refused, match=r"allowed\.json"):
        read_entries(keys)


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"name": "a", "role": "king", "public": "x" * 40},
        {"name": "../a", "role": "client", "public": "x" * 40},
        {"name": "a", "role": "client", "public": "x"},
        {"name": "a", "role": "worker", "public": "x" * 40, "offers": "*"},
    ],
)
def test_a_broken_entry_is_refused(keys: Path, entry: object) -> None:
    (keys / "allowed.json").write_text(json.dumps({"keys": [entry]}))
    with pytest.raises(Refused, match=r"allowed\.json"):
        read_entries(keys)


def test_an_address_that_others_reach_needs_keys(tmp_path: Path) -> None:
    for command in ("broker", "up"):
        done = ralmq(command, "--bind", "tcp://0.0.0.0:0", home=tmp_path)
        assert done.returncode == 2 and not done.stdout
        assert "ralmq keys init DIR" in done.stderr and "--keys DIR" in done.stderr


def test_the_key_file_of_a_peer_is_no_folder_for_a_broker(keys: Path, tmp_path: Path) -> None:
    done = ralmq("broker", "--bind", "tcp://0.0.0.0:0", "--keys", str(keys / "client.key"), home=tmp_path)
    assert done.returncode == 2 and "the key file of one peer" in done.stderr


def test_insecure_is_said_again_and_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each minute; shorter here, so that it is seen three times."""
    assert serve.EACH == 60.0
    monkeypatch.setattr(serve, "EACH", 0.01)

    async def three() -> None:
        task = asyncio.create_task(serve._serve("tcp://0.0.0.0:*", None, exposed=True))
        while caplog.text.count("--insecure: whoever reaches tcp://0.0.0.0:") < 3:
            assert not task.done()
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(asyncio.wait_for(three(), 30))


def test_nothing_but_the_command_makes_a_key() -> None:
    """That a peer is known by. A door's own lives as long as its process, and so does that of a lane to it."""
    made = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id)
        in {"curve_keypair", "create_certificates", "curve_public"}
    }
    assert made == {"cli/keys.py", "workers/direct/door.py", "workers/direct/lane.py"}
