"""Breaks and scales the containers of docker-compose.yml while they generate. Knows docker and what a client sees.

Every text is compared with that of an unbroken run; prints how long each fault lasted for whom.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import ralmq
from ralmq.client.client import Client
from ralmq.errors import DeadlineExceeded, RalmqError

READERS: Final = 8  # generations at a time
TOKENS: Final = 40
READ: Final = 0.02  # seconds that a reader takes for a token
OUT: Final = 8.0  # seconds without a network: heartbeats take 2.5 to notice, a name server 5 to be asked again
POLL: Final = 0.05
PATIENCE: Final = 180.0
BACK_WITHIN: Final = 4.0  # seconds from `network connect` to serving; with a name server in the way it was 4 to 15

Status = dict[str, Any]
Line = tuple[float, ...]


@dataclass
class Tally:
    """What became of the generations; `longest` is the longest wait for a next token since it was last set to 0."""

    finished: int = 0
    tokens: int = 0
    longest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def options() -> list[dict[str, Any]]:
    """Of the generations: greedy and sampled, with and without retrieval."""
    plain: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "temperature": 0.8, "top_p": 0.95}]
    knn = {"retrieve": "docs", "policy": "knn", "k": 8, "knn_temperature": 100.0}
    return plain + [{**one, **knn, "interval": interval} for interval, one in enumerate(plain, 1)]


async def read(client: Client, chosen: dict[str, Any], tally: Tally) -> list[int]:
    """The tokens of one generation; notes how long each was waited for."""
    tokens: list[int] = []
    before = time.monotonic()
    async for token in client.generate(
        "Return the sum of", model="demo", max_tokens=TOKENS, ignore_eos=True, wait_service=PATIENCE, **chosen
    ):
        tally.longest = max(tally.longest, time.monotonic() - before)
        tokens.append(token.id)
        tally.tokens += 1
        await asyncio.sleep(READ)
        before = time.monotonic()
    return tokens


@contextlib.asynccontextmanager
async def load(client: Client, tally: Tally) -> AsyncIterator[None]:
    """Generations, READERS at a time, until the block ends; those under way are read to their end."""
    wanted = [(chosen, await read(client, chosen, tally)) for chosen in options()]
    over = False

    async def reader(place: int) -> None:
        while not over:
            place += 1
            chosen, unbroken = wanted[place % len(wanted)]
            try:
                tokens = await read(client, chosen, tally)
            except RalmqError as error:
                tally.failed.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1)
                continue
            tally.finished += 1
            if tokens != unbroken:
                tally.wrong.append(f"{chosen}: {tokens} in place of {unbroken}")

    async with asyncio.TaskGroup() as group:
        for place in range(READERS):
            group.create_task(reader(place))
        try:
            yield
        finally:
            over = True


class Containers:
    """The containers of one compose project, and what the broker says of them."""

    def __init__(self, project: str, compose: list[str], client: Client) -> None:
        self.project = project
        self._compose = compose
        self._client = client

    def name(self, service: str) -> str:
        return f"{self.project}-{service}-1"

    async def docker(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec("docker", *arguments, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        if process.returncode:
            raise SystemExit(f"docker {' '.join(arguments)} failed")
        return output.decode().strip()

    async def scale(self, **services: int) -> None:
        scales = [f"--scale={service}={number}" for service, number in services.items()]
        await self.docker("compose", *self._compose, "--progress=quiet", "up", "-d", "--no-build", *scales)

    async def started(self, service: str) -> float:
        """When the container was started last, as the engine's clock has it."""
        at = await self.docker("inspect", "-f", "{{.State.StartedAt}}", self.name(service))
        return datetime.fromisoformat(at).timestamp()

    async def until(self, condition: Callable[[Status], Any], what: str) -> Status:
        """Polls `ralmq.status` until the condition holds."""
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(DeadlineExceeded):
                status = await self._client.status(deadline=5)
                if condition(status):
                    return status
            if time.monotonic() > end:
                raise SystemExit(f"compose-test: not within {PATIENCE:g} s: {what}")
            await asyncio.sleep(POLL)


def ready(status: Status, service: str) -> list[str]:
    return [w["name"] for w in status["workers"] if service in w["services"] and w["state"] == "ready"]


def formed(status: Status) -> list[list[str]]:
    return [pipeline["stages"] for pipeline in status["pipelines"] if pipeline["formed"]]


async def kill(containers: Containers, service: str) -> tuple[float, float]:
    """`kill -9` of the process in a container: until the engine has started it again, and until it serves again."""
    before = formed(await containers.until(formed, "a pipeline"))
    began, clock = time.monotonic(), time.time()
    # the first process of a container is init; `docker kill` would count as a stop, after which nothing is restarted
    line = "kill -9 $(cat /proc/1/task/1/children)"
    await containers.docker("exec", containers.name(service), "sh", "-c", line)
    await containers.until(lambda status: formed(status) not in ([], before), f"{service} is back")
    return await containers.started(service) - clock, time.monotonic() - began


async def disconnect(containers: Containers, service: str, offers: str) -> tuple[float, float]:
    """A container without its network for a while: until it was missed, and from its return until it serves again."""
    network, name = f"{containers.project}_cluster", containers.name(service)
    began = time.monotonic()
    await containers.docker("network", "disconnect", network, name)
    await containers.until(lambda status: not ready(status, offers), f"{offers} is missed")
    missed = time.monotonic() - began
    await asyncio.sleep(max(0.0, OUT - missed))
    await containers.docker("network", "connect", "--alias", service, network, name)
    connected = time.monotonic()
    await containers.until(lambda status: ready(status, offers), f"{offers} is back")
    return missed, time.monotonic() - connected


async def scale(containers: Containers) -> tuple[float, float]:
    """Two index servers and two generators, and one each again: seconds of each way."""
    began = time.monotonic()
    await containers.scale(index=2, generator=2)
    both = {"search:docs", "generate:demo"}
    await containers.until(lambda status: all(len(ready(status, name)) == 2 for name in both), "two of each")
    seen: set[str] = set()

    def all_at_work(status: Status) -> bool:
        seen.update(worker["name"] for worker in status["workers"] if worker["in_flight"])
        return set(ready(status, "generate:demo")) <= seen

    await containers.until(all_at_work, "work for both generators")
    there = time.monotonic()
    await containers.scale(index=1, generator=1)
    await containers.until(lambda status: all(len(ready(status, name)) == 1 for name in both), "one of each")
    return there - began, time.monotonic() - there


def told(what: str, lines: list[Line], columns: tuple[str, ...]) -> None:
    """One line: median, and the most where there are several."""
    parts = []
    for column, values in zip(columns, zip(*lines, strict=True), strict=True):
        most = f" (most {max(values):.2f})" if len(values) > 1 else ""
        parts.append(f"{column} {statistics.median(values):.2f} s{most}")
    times = f", {len(lines)} times" if len(lines) > 1 else ""
    print(f"{what}{times}: {', '.join(parts)}", flush=True)


async def repeated(tally: Tally, times: int, fault: Callable[[int], Awaitable[Line]]) -> list[Line]:
    """What each turn measured, and the longest wait of a reader in it, once all generations go on."""
    lines = []
    for turn in range(times):
        tally.longest = 0.0
        line = await fault(turn)
        before = tally.finished  # those that were under way have ended when as many again have
        while tally.finished < before + 2 * READERS and not tally.failed:
            await asyncio.sleep(POLL)
        lines.append((*line, tally.longest))
    return lines


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("project", help="compose project")
    parser.add_argument("files", nargs="+", help="its compose files")
    parser.add_argument("--times", type=int, default=1, help="each fault so many times")
    given = parser.parse_args()
    compose = ["-p", given.project, *(word for file in given.files for word in ("-f", file))]
    tally = Tally()
    async with ralmq.connect(name="compose-test") as asker, ralmq.connect(name="watcher") as watcher:
        containers = Containers(given.project, compose, watcher)
        async with load(asker, tally):
            kills = await repeated(tally, 2 * given.times, lambda n: kill(containers, f"stage-{n % 2}"))
            told("kill -9 of a stage", kills, ("started again after", "serves after", "longest wait for a token"))
            cuts = await repeated(tally, given.times, lambda n: disconnect(containers, "index", "search:docs"))
            told("index disconnected", cuts, ("missed after", "back after connect", "longest wait for a token"))
            scales = await repeated(tally, 1, lambda n: scale(containers))
            told("index and generator", scales, ("two of each after", "one of each after", "longest wait for a token"))
    print(f"{tally.finished} generations, {tally.tokens} tokens: {len(tally.failed)} failed, {len(tally.wrong)} wrong")
    for line in (tally.failed + tally.wrong)[:10]:
        print(line, file=sys.stderr)
    late = max(back for _, back, _ in cuts)
    if late > BACK_WITHIN:
        print(f"back {late:.1f} s after `network connect`: at most {BACK_WITHIN:g} s are allowed", file=sys.stderr)
    raise SystemExit(bool(tally.failed or tally.wrong or late > BACK_WITHIN))


asyncio.run(main())
