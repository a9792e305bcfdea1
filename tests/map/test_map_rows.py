"""`map_rows` within one process: order, failures, what an earlier run has left, what is refused."""

import asyncio
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import cluster
from map_files import Files, There, wanted
from ralmq.client.journal import SUFFIX, Journal, Rows
from ralmq.client.mapping import Mapped, map_rows
from ralmq.client.results import Reply
from ralmq.errors import (
    Busy,
    DeadlineExceeded,
    NoBroker,
    NoService,
    Poisoned,
    RalmqError,
    Refused,
    WorkerFailed,
    WorkerLost,
)
from ralmq.schema.tensor import tensor_of
from ralmq.workers.echo import Echo


class Away:
    """A client whose broker does not answer."""

    async def status(self, *, deadline: float) -> dict[str, Any]:
        raise NoBroker("no broker")


@pytest.mark.parametrize("concurrency", [1, 3, 200])
async def test_answers_in_the_order_of_the_rows(tmp_path: Path, concurrency: int) -> None:
    files = Files(tmp_path)
    told: list[tuple[int, ...]] = []
    found = await files.map(There(), concurrency=concurrency, told=lambda *counts: told.append(counts))
    assert found == Mapped(50, 0, 0)
    assert files.output == wanted(50)
    assert set(files.asked.values()) == {1}
    assert told[0] == (0, 0, 50) and told[-1] == (50, 0, 50)
    assert not files.journal.exists()


async def test_an_empty_input_gives_an_empty_output(tmp_path: Path) -> None:
    files = Files(tmp_path, 0)
    assert await files.map(There()) == Mapped(0, 0, 0)
    assert files.output == []


async def test_what_is_done_is_not_asked_for_again(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.stop = 23
    with pytest.raises(KeyError):
        await files.map(There(), concurrency=4)
    with Journal(files.target, Rows(files.source), "square") as journal:
        done = {n for n in range(50) if journal.has(n)}
    assert len(done) >= 19 and 23 not in done
    before, files.stop = Counter(files.asked), -1
    assert (await files.map(There(), concurrency=4)).before == len(done)
    assert files.output == wanted(50)
    assert {n for n in range(50) if files.asked[n] > before[n]} == set(range(50)) - done


@pytest.mark.parametrize("cut", [1, 5, 9, 11])
async def test_a_torn_end_of_the_journal_is_cut_off(tmp_path: Path, cut: int) -> None:
    files = Files(tmp_path, 20)
    files.stop = 12
    with pytest.raises(KeyError):
        await files.map(There(), concurrency=1)
    whole = files.journal.read_bytes()
    files.journal.write_bytes(whole[:-cut])
    files.stop = -1
    found = await files.map(There())
    assert found.before == 11
    assert files.output == wanted(20)
    assert files.asked[11] == 2


async def test_a_journal_torn_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    files.journal.write_bytes(b"ralmq map 1\t{")
    assert (await files.map(There())).before == 0
    assert files.output == wanted(3)


async def test_a_journal_that_is_done_gives_the_output_again(tmp_path: Path) -> None:
    """As after a kill between the output's coming into its place and the journal's end."""
    files = Files(tmp_path, 5)
    rows = Rows(files.source)
    with Journal(files.target, rows, "square") as journal:
        journal.add([(n, {"n": n, "square": n * n}, False) for n in (4, 1, 0, 3, 2)])
    for output in (None, "half"):
        if output:
            files.target.write_text(output)
        journal_bytes = files.journal.read_bytes()
        assert await files.map(There()) == Mapped(5, 0, 5)
        assert files.output == wanted(5) and not files.asked
        files.journal.write_bytes(journal_bytes)


async def test_failures_of_rows_stand_in_their_places(tmp_path: Path) -> None:
    files = Files(tmp_path, 10)
    files.fault = {3: [WorkerFailed("broke")], 5: [DeadlineExceeded("late")]}
    assert (await files.map(There())).failed == 2
    assert files.output[3] == {"error": "broke", "code": "worker_failed"}
    assert files.output[5] == {"error": "late", "code": "deadline"}
    assert [line for n, line in enumerate(files.output) if n not in (3, 5)] == [
        row for row in wanted(10) if row["n"] not in (3, 5)
    ]


async def test_strict_ends_at_a_failure_and_names_the_row(tmp_path: Path) -> None:
    files = Files(tmp_path, 10)
    files.fault = {3: [WorkerFailed("broke")]}
    with pytest.raises(WorkerFailed, match="row 4: broke"):
        await files.map(There(), strict=True, concurrency=2)
    assert not files.target.exists()
    assert (await files.map(There(), strict=True)).before >= 2
    assert files.output == wanted(10) and files.asked[3] == 2


async def test_busy_and_lost_workers_are_asked_again(tmp_path: Path) -> None:
    files = Files(tmp_path, 5)
    files.fault = {
        1: [Busy("full", retry_after=0.001) for _ in range(20)],
        2: [WorkerLost("gone", worker="a"), WorkerLost("gone", worker="b")],
        4: [WorkerLost("gone", worker=name) for name in "abcdef"],
    }
    assert (await files.map(There())).failed == 1
    assert files.output[:4] == wanted(4)
    assert files.output[4]["code"] == Poisoned.code
    assert files.asked == {0: 1, 1: 21, 2: 3, 3: 1, 4: 3}


@pytest.mark.parametrize("error", [NoService("none"), NoBroker("none"), DeadlineExceeded("late")])
async def test_a_broker_or_service_that_is_gone_ends_the_job_and_no_row(tmp_path: Path, error: RalmqError) -> None:
    files = Files(tmp_path, 10)
    files.fault = {6: [error]}
    with pytest.raises((NoService, NoBroker)):
        await files.map(Away(), concurrency=1)
    found = await files.map(There())
    assert (found.before, found.failed) == (6, 0)
    assert files.output == wanted(10)


async def test_a_cancelled_job_keeps_what_was_answered(tmp_path: Path) -> None:
    files = Files(tmp_path)
    task = asyncio.create_task(files.map(There(), concurrency=3))
    while sum(files.asked.values()) < 20:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    found = await files.map(There())
    assert found.before >= 10
    assert files.output == wanted(50)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 3: no JSON"),
        ("[1]", "line 3: no object"),
        ("\xff", "line 3: no JSON"),
        ("[" * 100_000, "line 3: no JSON"),
    ],
)
async def test_a_broken_row_is_named_before_any_is_asked(tmp_path: Path, line: str, said: str) -> None:
    files = Files(tmp_path, 4)
    lines = files.source.read_bytes().splitlines(keepends=True)
    lines[2] = line.encode("latin-1") + b"\n"
    files.source.write_bytes(b"".join(lines))
    with pytest.raises(Refused, match=said):
        await files.map(There())
    assert not files.asked and not files.journal.exists()


async def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path, 10)
    files.stop = 5
    with pytest.raises(KeyError):
        await files.map(There(), concurrency=1)
    kept = files.source.read_text()
    files.source.write_text(kept.replace("9", "8"))
    with pytest.raises(Refused, match="the input has changed"):
        await files.map(There())
    files.source.write_text(kept)
    with pytest.raises(Refused, match="another job \\(square; this one: cube"):
        await files.map(There(), job="cube")
    with Journal(files.target, Rows(files.source), "square"), pytest.raises(Refused, match="another run"):
        await files.map(There())
    files.target.write_text("mine")
    with pytest.raises(Refused, match="is there already"):
        await files.map(There())
    files.journal.unlink()
    with pytest.raises(Refused, match="is there already"):
        await files.map(There())
    assert files.target.read_text() == "mine"
    files.target.unlink()
    for notes in ("notes of somebody\n", "notes without an end", "ralmq map 2"):
        files.journal.write_text(notes)
        with pytest.raises(Refused, match="no journal of `ralmq map`"):
            await files.map(There())
        assert files.journal.read_text() == notes
    with pytest.raises(Refused, match="cannot be read"):
        await map_rows(There(), files.ask, tmp_path / "none", files.target, job="square")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="cannot be written"):
        await map_rows(There(), files.ask, files.source, tmp_path / "a" / "b", job="square")  # type: ignore[arg-type]


async def test_an_input_that_changes_meanwhile_is_seen(tmp_path: Path) -> None:
    files = Files(tmp_path, 3)
    rows = Rows(files.source)
    for text in ('{"n": 0}\n' * 4, '{"n": 0}\n', '{"n": 0}\n' * 3):
        files.source.write_text(text)
        with pytest.raises(Refused, match="has changed while"):
            list(rows)


async def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """A pipe would be empty when it is read again."""
    files = Files(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe")
    for source in ("pipe", "."):
        with pytest.raises(Refused, match="no pipe or folder"):
            await map_rows(There(), files.ask, tmp_path / source, files.target, job="x")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="is a folder"):
        await map_rows(There(), files.ask, files.source, tmp_path, job="x")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="is a folder"):
        await map_rows(There(), files.ask, files.source, ".", job="x")  # type: ignore[arg-type]
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


async def test_half_a_character_stays_in_an_answer(tmp_path: Path) -> None:
    files = Files(tmp_path, 1)

    async def ask(body: dict[str, Any]) -> Any:
        return {"text": "é\ud83d"}

    await map_rows(There(), ask, files.source, files.target, job="x")  # type: ignore[arg-type]
    assert files.output == [{"text": "é\ud83d"}]


async def test_replies_hold_tensors_as_lists(tmp_path: Path) -> None:
    files = Files(tmp_path, 2)

    async def ask(body: dict[str, Any]) -> Reply:
        array = np.array([[1.5, np.nan]], np.float32) if body["n"] else None
        return Reply({"raw": b"\x01\xff"}, () if array is None else (tensor_of(array),))

    await map_rows(There(), ask, files.source, files.target, job="x")  # type: ignore[arg-type]
    assert files.output == [{"raw": "01ff"}, {"raw": "01ff", "tensors": [[[1.5, None]]]}]


async def test_over_a_broker_whose_worker_takes_few_at_a_time(tmp_path: Path) -> None:
    files = Files(tmp_path, 300)
    async with cluster(Echo(capacity=2), Echo(capacity=3)) as all_of_it:
        client = await all_of_it.client()

        async def ask(body: dict[str, Any]) -> Reply:
            return await client.request("echo", body)

        found = await map_rows(client, ask, files.source, files.target, job="echo", concurrency=64)
        await all_of_it.idle()
    assert found == Mapped(300, 0, 0)
    assert files.output == [{"n": n} for n in range(300)]
