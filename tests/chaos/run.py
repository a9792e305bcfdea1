"""Faults over a real cluster under load: `make chaos FAULTS=n SEED=s`, or `python tests/chaos/run.py --faults n`.

Processes are killed and stopped, connections cut and held, at random and from one seed; the tokens of each generation
are compared with those of the same cluster before. Exit 1 where one was lost, doubled or wrong, or something leaked.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import ralmq  # noqa: E402
from checkpoints import tiny  # noqa: E402
from jobs import MODEL, VOCAB, Load, Wait, answer, jobs  # noqa: E402
from proxy import Proxy  # noqa: E402
from ralmq.client.client import Client  # noqa: E402
from ralmq.cluster.cluster import Cluster  # noqa: E402
from ralmq.cluster.supervise import supervise  # noqa: E402
from ralmq.workers.datastore.build import build_datastore  # noqa: E402
from ralmq.workers.datastore.sources import Document  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

STAGES, CLIENTS = 2, 4
KINDS = {"kill": 4, "stop": 2, "cut": 3, "hold": 2}  # how often each
SETTLE = 90.0  # seconds in which everything must be at rest at the end
BEAT = 1.0


@dataclass
class World:
    """A running cluster, each process behind a proxy of its own."""

    cluster: Cluster
    proxies: dict[str, Proxy] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)  # processes that are stopped or held now
    replayed: dict[int, int] = field(default_factory=dict)  # tokens, as each generator last told


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """Two pipelines' worth of stages, two generators, two servers of one index, four clients."""
    path = tiny("llama", folder / "model")
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster(folder / "logs"))
        made = World(cluster)

        async def behind(name: str) -> str:
            made.proxies[name] = await stack.enter_async_context(Proxy(cluster.url))
            return made.proxies[name].url

        async def spawn(kind: str, process: str, /, **options: Any) -> None:
            flags = [text for key, value in options.items() for text in ("-o", f"{key}={value}")]
            await cluster.spawn(kind, "--broker", await behind(process), *flags, name=process)

        for copy in range(2):
            for place in range(STAGES):
                options = {"model": path, "stage": f"{place}/{STAGES}", "name": MODEL, "deterministic": 8}
                await spawn("stage", f"stage-{place}-{copy}", **options)
            await spawn("generator", f"generator-{copy}", model=path, name=MODEL)
        await cluster.ready()
        async with ralmq.connect(cluster.url) as client:
            await build(client, folder / "docs")
        for copy in range(2):
            await spawn("index", f"index-{copy}", index=folder / "docs")
        await cluster.ready()
        for number in range(CLIENTS):
            url = await behind(f"client-{number}")
            made.clients.append(await stack.enter_async_context(ralmq.connect(url, wait=30)))
        yield made


async def build(client: Client, out: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = np.random.default_rng(8).integers(3, VOCAB, 600)
    documents = [Document("a.txt", " ".join(f"w{word}" for word in words))]
    await build_datastore(client, model=MODEL, name="docs", documents=documents, tokenizer=tokenizer, out=out)


async def strike(made: World, chance: random.Random) -> tuple[str, Any]:
    """One fault; what undoes it, or None. A process that is stopped or held already is left alone."""
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    names = [*made.cluster.children] if kind in ("kill", "stop") else [*made.proxies]
    name = chance.choice([name for name in names if name not in made.busy])
    seconds = chance.uniform(0.5, 6.0)
    if kind == "cut":
        made.proxies[name].cut()
    elif kind == "hold":
        return f"hold {name}", busy(made, name, made.proxies[name].hold(seconds))
    else:
        child = made.cluster.children[name]
        if child.code is None:
            os.kill(child.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        if kind == "stop":
            return f"stop {name}", busy(made, name, resumed(child.pid, seconds))
    return f"{kind} {name}", None


async def resumed(pid: int, seconds: float) -> None:
    try:
        await asyncio.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def busy(made: World, name: str, undo: Any) -> None:
    made.busy.add(name)
    try:
        await undo
    finally:
        made.busy.discard(name)


async def at_rest(made: World) -> list[str]:
    """Empty once nothing is open, every block is free and every process is known; else what is left."""
    left = ["the broker does not answer"]
    end = time.monotonic() + SETTLE
    while left and time.monotonic() < end:
        await asyncio.sleep(0.5)
        with contextlib.suppress(ralmq.errors.RalmqError):
            left = leaks(made, await made.clients[0].status(deadline=5.0))
    return left


def missing(made: World, status: dict[str, Any]) -> list[str]:
    known = {worker["pid"] for worker in status["workers"]}
    found = [f"{n} is not back" for n, c in made.cluster.children.items() if n != "broker" and c.pid not in known]
    return found + [f"{pipeline['model']} is not formed" for pipeline in status["pipelines"] if not pipeline["formed"]]


def leaks(made: World, status: dict[str, Any]) -> list[str]:
    found: list[str] = []
    if status["broker"]["open_requests"]:
        found.append(f"{status['broker']['open_requests']} requests are open")
    found += missing(made, status)
    for worker in status["workers"]:
        gauges = worker.get("gauges", {})
        held = gauges.get("kv_blocks", 0) - gauges.get("free_blocks", 0)
        open_ = worker["in_flight"] or gauges.get("sequences") or gauges.get("answering")
        if open_ or held:
            found.append(f"{worker['name']} holds {open_} requests, {held} KV blocks")
    return found


async def watch(made: World) -> None:
    """Keeps what generators tell, since they may end at any time."""
    while True:
        await asyncio.sleep(BEAT / 2)
        with contextlib.suppress(ralmq.errors.RalmqError):
            for worker in (await made.clients[0].status(deadline=2 * BEAT))["workers"]:
                made.replayed[worker["pid"]] = worker.get("gauges", {}).get("replayed_tokens", 0)


async def complete(made: World, wait: Wait) -> None:
    """The fault's own pause is over and all processes are back, so that the next one meets a whole cluster."""
    end = time.monotonic() + SETTLE
    while time.monotonic() < end:
        await asyncio.sleep(0.1)
        with contextlib.suppress(ralmq.errors.RalmqError):
            status = await made.clients[0].status(deadline=2 * BEAT)
            if not wait.open and not made.busy and not missing(made, status):
                return


def descriptors(made: World) -> dict[int, int]:
    found: dict[int, int] = {}
    for child in made.cluster.children.values():
        with contextlib.suppress(FileNotFoundError):  # it has ended, which `missing` tells
            found[child.pid] = len(os.listdir(f"/proc/{child.pid}/fd"))
    return found


async def chaos(options: argparse.Namespace, console: Console) -> bool:
    chance = random.Random(options.seed)
    waits: list[Wait] = []
    kinds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="ralmq-chaos-") as folder:
        async with world(Path(folder)) as made:
            wanted = [(job, await answer(made.clients[0], job)) for job in jobs()]
            before = descriptors(made)
            load = Load(made.clients, wanted, options.seed)
            beside = [asyncio.create_task(task) for task in (supervise(made.cluster), watch(made))]
            running = [asyncio.create_task(load.run(place)) for place in range(options.concurrency)]
            undoing: set[asyncio.Task[None]] = set()
            with Progress(console=console, transient=True) as progress:
                bar = progress.add_task("faults", total=options.faults)
                for _ in range(options.faults):
                    await asyncio.sleep(chance.uniform(0.2, 2 * options.pause))
                    what, undo = await strike(made, chance)
                    waits.append(load.fault(what))
                    kinds[what.split("-")[0]] += 1
                    if undo is not None:
                        undoing.add(task := asyncio.create_task(undo))
                        task.add_done_callback(undoing.discard)
                    progress.update(bar, advance=1, description=what)
                    if options.apart:
                        await complete(made, waits[-1])
            load.over = True
            await asyncio.gather(*running)
            await asyncio.gather(*undoing)
            left = await at_rest(made)
            after = descriptors(made)
            for task in beside:
                task.cancel()
            grown = {
                pid: after[pid] - count for pid, count in before.items() if pid in after and after[pid] > count + 8
            }
            logs = [line for log in (Path(folder) / "logs").glob("*.log") for line in tracebacks(log)]
    left += [f"process {pid} has {n} more descriptors" for pid, n in grown.items()]
    return show(load, waits, kinds, [*left, *logs], sum(made.replayed.values()), console)


def tracebacks(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [f"{log.stem}: {line}" for line in lines if line.startswith("Traceback")]


def show(load: Load, waits: list[Wait], kinds: Counter[str], left: list[str], again: int, console: Console) -> bool:
    tally = load.tally
    table = Table("what", "count", title=f"{sum(kinds.values())} faults", title_justify="left")
    rows: list[tuple[str, object]] = [(kind, count) for kind, count in sorted(kinds.items())]
    rows += [
        ("generations started", tally.started),
        ("finished", tally.finished),
        ("given up on purpose", tally.given_up),
    ]
    rows += [("lost", len(tally.lost)), ("doubled", tally.doubled), ("wrong", tally.wrong), ("tokens", tally.tokens)]
    rows.append(("tokens that pipelines were given again, as far as told", again))
    for kind in sorted({wait.kind.split("-")[0] for wait in waits}):
        times = sorted(wait.seconds for wait in waits if wait.kind.split("-")[0] == kind)
        high = times[min(len(times) - 1, int(len(times) * 0.99))]
        what = f"longest wait after a {kind} ({len(times)}), beats of {BEAT:g} s: p50, p99"
        rows.append((what, f"{statistics.median(times) / BEAT:.2f}, {high / BEAT:.2f}"))
    rows.append(("leaks", len(left)))
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)
    for line in (*tally.lost[:20], *left[:20]):
        console.print(line, style="red", markup=False)
    return not (tally.lost or tally.doubled or tally.wrong or left) and tally.finished > 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos")
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between faults, on the average")
    parser.add_argument("--apart", action="store_true", help="each fault after the last one's recovery, to measure it")
    options = parser.parse_args()
    console = Console()
    console.print(f"seed {options.seed}")
    good = asyncio.run(chaos(options, console))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
