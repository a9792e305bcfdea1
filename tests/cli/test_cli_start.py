"""What the commands load, and what --help and --json print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import broker, eventually, ralmq, started
from ralmq.cli.main import app
from typer.testing import CliRunner

HEAVY = {"torch", "faiss", "numpy", "pydantic", "rich", "zmq", "msgpack", "tokenizers", "asyncio"}
COMMANDS = [
    "demo",
    "up",
    "down",
    "status",
    "logs",
    "broker",
    "worker",
    "generate",
    "search",
    "index",
    "bench",
    "keys",
    "drain",
    "plan",
    "join",
]


def loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    line = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout.split())


def test_help_loads_nothing_heavy() -> None:
    code = "from ralmq.cli.main import app\napp(['--help'], standalone_mode=False)"
    found = loaded(code)
    assert "typer" in found
    assert found & (HEAVY - {"asyncio"}) == set()


@pytest.mark.parametrize("module", ["ralmq", "ralmq.errors", "ralmq.workers", "ralmq.workers.process"])
def test_no_torch_and_no_faiss_before_they_are_needed(module: str) -> None:
    assert loaded(f"import {module}") & {"torch", "faiss", "pydantic", "rich"} == set()


def test_help_lists_the_commands_whose_time_has_come(tmp_path: Path) -> None:
    done = ralmq("--help", home=tmp_path)
    listed = {line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line.strip()}
    assert done.returncode == 0
    assert set(COMMANDS) <= listed


@pytest.mark.parametrize("command", [*COMMANDS, "index build", "bench broker"])
def test_each_command_has_its_help(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="ralmq")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: ralmq {command}")


@pytest.mark.parametrize("group", [(), ("index",), ("bench",)])
def test_a_group_alone_shows_its_help(group: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, group)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "Commands:" in done.stdout


def test_status_is_one_document_or_tables(tmp_path: Path) -> None:
    with broker(tmp_path) as url:
        (tmp_path / "w").mkdir()
        options = ("-o", "name=back", "--name", "my-echo")
        with started("worker", "echo", "--broker", url, *options, home=tmp_path / "w") as worker:
            found = eventually(lambda: with_workers(tmp_path, url))
            assert found["broker"]["open_requests"] >= 0
            assert found["services"]["back"]["workers"] == 1
            (line,) = found["workers"]
            assert line["name"].startswith("my-echo-")
            facts = (line["services"], line["state"], line["pid"], line["in_flight"], line["capacity"])
            assert facts == (["back"], "ready", worker.pid, 0, 64)
            shown = ralmq("status", home=tmp_path, environment={"RALMQ_BROKER": url})
            assert shown.returncode == 0
            assert all(text in shown.stdout for text in (url, line["name"], "ready", "0 / 64", str(worker.pid)))


def with_workers(home: Path, url: str) -> dict[str, object] | None:
    done = ralmq("status", "--json", "--broker", url, home=home)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, object] = json.loads(done.stdout)
    return found if found["workers"] else None
