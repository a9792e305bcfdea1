"""`ralmq map` as a user runs it: replicas and the client itself killed, exit codes, what is on stdout and stderr."""

import asyncio
import json
import shutil
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ralmq
from commands import RALMQ, env_of
from serving import Process, broker, free_url, until, worker

COUNT = 1000
HERE = Path(__file__).parent


def rows(folder: Path, count: int = COUNT) -> Path:
    """The input, where the others are too."""
    shutil.copy(HERE / "counted.py", folder)
    path = folder / "in.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(count)))
    return path


def square(n: int) -> dict[str, Any]:
    if n % 100 == 7:
        error = f"square failed: ValueError: {n} is not liked (its log has the place)"
        return {"error": error, "code": "worker_failed"}
    return {"n": n, "square": n * n, "text": f"№ {n}"}


def journalled(folder: Path) -> list[int]:
    """The rows that are done, as far as their lines are whole."""
    path = folder / "out.jsonl.progress"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[1:-1]
    return [int(line.split(b"\t")[0]) for line in lines]


def asked(folder: Path) -> list[int]:
    note = folder / "note"
    return [int(line) for line in note.read_text().split()] if note.exists() else []


async def map_(folder: Path, url: str, *more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *RALMQ,
        "map", "in.jsonl", "out.jsonl", "--broker", url, *more,
        cwd=folder, env=env_of(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def test_a_replica_and_the_client_are_killed_and_each_row_is_there_once(tmp_path: Path) -> None:
    rows(tmp_path)
    url = free_url()
    with ExitStack() as stack:
        stack.enter_context(broker(tmp_path, url))
        options = {"note": tmp_path / "note", "delay_ms": 5}
        replicas = [stack.enter_context(worker(tmp_path, url, "counted:Square", **options)) for _ in range(3)]
        arguments = ("map", "in.jsonl", "out.jsonl", "--service", "square", "--broker", url)
        with Process(tmp_path, *arguments, "--wait-service", "20") as client:
            await until(lambda: len(journalled(tmp_path)) > 100, "a hundred rows")
            replicas[0].send(signal.SIGKILL)
            await until(lambda: len(journalled(tmp_path)) > 300, "three hundred rows")
            client.send(signal.SIGKILL)
            await client.ended()
        done, before = journalled(tmp_path), len(asked(tmp_path))
        assert 300 < len(set(done)) == len(done) < COUNT
        assert not (tmp_path / "out.jsonl").exists()
        with (tmp_path / "out.jsonl.progress").open("ab") as journal:
            journal.write(b'999\t0\t{"n": 99')  # torn, as where the machine ends in the middle of a write
        code, out, _ = await map_(tmp_path, url, "--service", "square", "--json")
        assert (code, json.loads(out)) == (
            1,
            {"rows": COUNT, "failed": 10, "before": len(done), "output": "out.jsonl"},
        )
        again = asked(tmp_path)[before:]
        assert not set(again) & set(done), "rows that were on the disk were asked again"
        assert sorted(again) == sorted(set(range(COUNT)) - set(done))
        async with ralmq.connect(url) as one:
            serial = [await asked_one(one, n) for n in range(COUNT)]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == serial == [square(n) for n in range(COUNT)]
    assert not (tmp_path / "out.jsonl.progress").exists()


async def asked_one(client: ralmq.Client, n: int) -> dict[str, Any]:
    try:
        return (await client.request("square", {"n": n})).body
    except ralmq.errors.WorkerFailed as error:
        return {"error": error.message, "code": error.code}


async def test_exit_codes_and_what_is_said(tmp_path: Path) -> None:
    rows(tmp_path, 20)
    url = free_url()
    with broker(tmp_path, url), worker(tmp_path, url), worker(tmp_path, url, "counted:Square", note=tmp_path / "note"):
        code, out, error = await map_(tmp_path, url, "--service", "echo", "--wait-service", "20")
        assert (code, out) == (0, "20 rows in out.jsonl; 0 failed\n")
        assert "20/20" in error
        code, out, error = await map_(tmp_path, url, "--service", "echo")
        assert (code, out) == (2, "") and "out.jsonl: is there already" in error
        (tmp_path / "out.jsonl").unlink()
        code, out, error = await map_(tmp_path, url, "--service", "square", "--strict", "--wait-service", "20")
        assert (code, out) == (1, "") and "row 8: square failed: ValueError: 7 is not liked" in error
        code, out, error = await map_(tmp_path, url, "--service", "echo")
        assert (code, out) == (2, "") and "belongs to another job (square; this one: echo)" in error
        code, out, error = await map_(tmp_path, url, "--service", "none")
        assert (code, out) == (2, "") and "no worker offers none" in error
        for option in (("--deadline", "0"), ("--deadline", "nan"), ("--wait-service", "nan")):
            code, out, error = await map_(tmp_path, url, "--service", "echo", *option)
            assert (code, out) == (2, "") and "give seconds above 0" in error
        (tmp_path / "in.jsonl").write_text("{}\n7\n")
        code, out, error = await map_(tmp_path, url, "--service", "echo")
        assert (code, out) == (2, "") and "in.jsonl: line 2: no object" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_leaves_a_journal_that_is_gone_on_with(tmp_path: Path, number: signal.Signals) -> None:
    rows(tmp_path, 200)
    url = free_url()
    with broker(tmp_path, url), worker(tmp_path, url, "counted:Square", note=tmp_path / "note", delay_ms=10):
        arguments = ("map", "in.jsonl", "out.jsonl", "--service", "square", "--broker", url)
        with Process(tmp_path, *arguments, "--wait-service", "20") as client:
            await until(lambda: len(journalled(tmp_path)) > 20, "twenty rows")
            client.send(number)
            assert await client.ended() in (130, 143)
        code, _, _ = await map_(tmp_path, url, "--service", "square")
        assert code == 1
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [square(n) for n in range(200)]
