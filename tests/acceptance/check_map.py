"""`ralmq map`: a thousand rows over three replicas; one is killed, and the client once. Each row is there once.

Rows whose answers were on the disk are not asked for again; the output is that of one request after the other.
"""

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ralmq
from checks import Line, counted, size
from serving import Process, broker, free_url, until, worker

ROWS = size(1000, 200)
REPLICAS = 3
JOURNAL = "out.jsonl.progress"


def lines_of(path: Path) -> list[bytes]:
    """The whole lines of a file that another process writes."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def done_in(folder: Path) -> list[int]:
    return [int(line.split(b"\t")[0]) for line in lines_of(folder / JOURNAL)[1:]]


async def answer(client: ralmq.Client, row: dict[str, Any]) -> dict[str, Any]:
    try:
        return (await client.request("square", row)).body
    except ralmq.errors.RalmqError as error:
        return {"error": error.message, "code": error.code}


class Job:
    """The command, run as often as it takes."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._arguments = ("map", "in.jsonl", "out.jsonl", "--service", "square", "--broker", url)

    def started(self) -> Process:
        return Process(self._folder, *self._arguments, "--wait-service", "20")

    async def interrupted(self, replica: Process) -> list[int]:
        """The rows that are done when a replica was killed, then the client."""
        with self.started() as client:
            await until(lambda: len(done_in(self._folder)) > ROWS // 10)
            replica.send(signal.SIGKILL)
            await until(lambda: len(done_in(self._folder)) > ROWS // 3)
            client.send(signal.SIGKILL)
            await client.ended()
        return done_in(self._folder)


@counted
async def map_over_replicas(folder: Path) -> AsyncIterator[Line]:
    shutil.copy(Path(__file__).parents[1] / "map" / "counted.py", folder)
    (folder / "in.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(ROWS)))
    url, note = free_url(), folder / "note"
    with ExitStack() as stack:
        stack.enter_context(broker(folder, url))
        start = [worker(folder, url, "counted:Square", note=note, delay_ms=5) for _ in range(REPLICAS)]
        replicas = [stack.enter_context(each) for each in start]
        job = Job(folder, url)
        done = await job.interrupted(replicas[0])
        before = len(lines_of(note))
        began = time.monotonic()
        with job.started() as client:
            code = await client.ended()
        seconds = time.monotonic() - began
        again = [int(line) for line in lines_of(note)[before:]]
        async with ralmq.connect(url) as client_:
            serial = [await answer(client_, {"n": n}) for n in range(ROWS)]
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    yield Line(
        f"rows of the output, of {ROWS}, one replica of {REPLICAS} and the client killed",
        f"= {ROWS}, in order, as one after the other",
        f"{len(found)}, {sum(one == other for one, other in zip(found, serial, strict=False))} the same; exit {code}",
        found == serial and code == 1,  # one in a hundred rows fails, as it should
    )
    yield Line(
        "rows asked for again though their answers were on the disk",
        f"= 0 of {len(done)}",
        str(len(set(again) & set(done))),
        not set(again) & set(done) and len(set(done)) == len(done) < ROWS,
    )
    yield Line(
        "rows of the second run, each asked for once",
        f"= {ROWS - len(done)}",
        f"{len(again)}, each {max(Counter(again).values())} times at most; {len(again) / seconds:.0f} a second",
        sorted(again) == sorted(set(range(ROWS)) - set(done)),
    )
