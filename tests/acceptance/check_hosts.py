"""Three hosts with 100 Mbit/s between them and keys: `ralmq up` on one, `ralmq join` on two, a ring over them."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ralmq
from chaos.run import build
from checkpoints import tiny
from checks import Line, counted
from jobs import MODEL, answer, jobs
from lan import Host, lan, missing
from ralmq.cluster.local import local_cluster

HERE = Path(__file__).parent
NAMES = ("a", "b", "c")
URL = "tcp://10.77.0.1:5555"
CUT = 5.0  # seconds
TOKENS = 64
ITEM = 4  # bytes of a number in fp32
BESIDE = 300  # bytes beside the hidden states
FILE = """
[cluster]
broker = "tcp://10.77.0.1:5555"
machine = "a"
keys = "{keys}"
data_plane = "ring"

[machines.a]
[machines.b]
[machines.c]

[models.m]
path = "{model}"
generator = "a"
stages = [
  {{ machine = "a", layers = "{cuts[0]}" }},
  {{ machine = "b", layers = "{cuts[1]}" }},
  {{ machine = "c", layers = "{cuts[2]}" }},
]
options = {{ deterministic = 8 }}

[indexes.docs]
path = "{index}"
machine = "b"
"""


class Asker:
    """lan_client.py on one host."""

    def __init__(self, host: Host, keys: Path) -> None:
        command = host.wrapped(sys.executable, str(HERE / "lan_client.py"), URL, str(keys))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **job: Any) -> Iterator[dict[str, Any]]:
        """What it says, line by line, up to the end of the job."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for text in self._process.stdout:
            line = json.loads(text)
            yield line
            if "token" not in line:
                return
        raise AssertionError("the client ended")

    def texts(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        *_, end = self.ask(prompts=[list(prompt) for prompt in prompts], **options)
        found: list[list[int]] = end["texts"]
        return found

    def status(self) -> dict[str, Any]:
        time.sleep(2.2)  # the last beats tell all
        (line,) = self.ask(status=True)
        status: dict[str, Any] = line["status"]
        return status

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@contextmanager
def started(folder: Path, host: Host, keys: Path, *arguments: str) -> Iterator[None]:
    """`ralmq ARGUMENTS` on a host, ended as by Ctrl-C."""
    home = folder / host.name
    home.mkdir()
    shutil.copy(keys, home / "worker.key")
    (home / "worker.key").chmod(0o600)
    with (folder / f"{host.name}.log").open("wb") as log:
        process = subprocess.Popen(
            host.wrapped(sys.executable, "-m", "ralmq", *arguments),
            stdout=log,
            stderr=log,
            env={**os.environ, "XDG_STATE_HOME": str(home), "RALMQ_KEYS": str(home / "worker.key")},
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def moved(asker: Asker, prompts: Sequence[Sequence[int]], width: int) -> float:
    """Bytes of one decode step on the hop from b to c, beside its hidden states."""

    def sent() -> tuple[int, int]:
        status = asker.status()
        name = status["pipelines"][0]["stages"][1]
        gauges = next(entry["gauges"] for entry in status["workers"] if entry["name"] == name)
        return gauges["ring_bytes"], gauges["ring_steps"]

    def beside(tokens: int) -> tuple[float, int]:
        before = sent()
        asker.texts(prompts, max_tokens=tokens, ignore_eos=True)
        after = sent()
        return after[0] - before[0], after[1] - before[1]

    one, many = beside(1), beside(TOKENS)  # the first token comes with the prompt
    hidden = len(prompts) * (TOKENS - 1) * width * ITEM  # of all those steps, whose rows the leader chooses
    return (many[0] - one[0] - hidden) / (many[1] - one[1])


@counted
async def three_hosts(folder: Path) -> AsyncIterator[Line]:
    if lacks := missing():
        yield Line("three hosts in network namespaces", "all lines", f"not run: it needs {lacks}", True, required=False)
        return
    path = tiny("llama", folder / "model")
    config = json.loads((path / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    cuts = [f"{place * layers // 3}:{(place + 1) * layers // 3}" for place in range(3)]
    extra = [["stage", "-o", f"model={path}", "-o", "stage=0/1", "-o", f"name={MODEL}", "-o", "deterministic=8"]]
    extra += [["generator", "-o", f"model={path}", "-o", f"name={MODEL}"]]
    plain = {"max_tokens": TOKENS, "ignore_eos": True}
    ways = {
        "generation": plain,
        "retrieval": {**plain, "retrieve": "docs", "k": 4, "interval": 2, "knn_temperature": 100.0},
    }
    prompts = [job.prompt for job in jobs()[:4]]
    wanted: dict[str, list[list[int]]] = {}
    async with local_cluster(stages=0, generator=False, extra=extra) as cluster, ralmq.connect(cluster.url) as client:
        await build(client, folder / "docs")
        await cluster.spawn("index", "-o", f"index={folder / 'docs'}")
        await cluster.ready()
        for name, options in ways.items():
            texts = [type(jobs()[0])(prompt, options) for prompt in prompts]
            wanted[name] = list(await asyncio.gather(*[answer(client, job) for job in texts]))
    keys = folder / "keys"
    subprocess.run([sys.executable, "-m", "ralmq", "keys", "init", str(keys)], check=True, stdout=subprocess.DEVNULL)
    file = folder / "cluster.toml"
    file.write_text(FILE.format(keys=keys, model=path, cuts=cuts, index=folder / "docs"))
    with ExitStack() as stack:
        hosts = stack.enter_context(lan(*NAMES))
        key = keys / "worker.key"
        stack.enter_context(started(folder, hosts[0], key, "up", str(file), "--machine", "a", "--keys", str(keys)))
        for host, name in zip(hosts[1:], NAMES[1:], strict=True):
            stack.enter_context(started(folder, host, key, "join", URL, "--machine", name))
        asker = Asker(hosts[0], keys / "admin.key")
        stack.callback(asker.close)
        for name, options in ways.items():
            found = await asyncio.to_thread(asker.texts, prompts, **options)
            equal = sum(a == b for a, b in zip(found, wanted[name], strict=True))
            yield Line(
                f"three hosts, {name}: texts equal to one process's",
                "all",
                f"{equal} of {len(found)}",
                equal == len(found),
            )
        for rows in (1, 4):
            extra_bytes = await asyncio.to_thread(moved, asker, prompts[:rows], width)
            yield Line(
                f"bytes of a decode step on a hop, {rows} texts at a time, beside rows x d x {ITEM}",
                f"<= {BESIDE}",
                f"{extra_bytes:.0f}",
                extra_bytes <= BESIDE,
            )
        found, pause = await asyncio.to_thread(_cut, asker, hosts[2], prompts, ways["generation"])
        equal = sum(a == b for a, b in zip(found, wanted["generation"], strict=True))
        yield Line(
            f"a host cut off for {CUT:g} s amid texts: they go on and are equal",
            "all",
            f"{equal} of {len(found)}, pause {pause:.1f} s",
            equal == len(found),
        )


def _cut(asker: Asker, host: Host, prompts: Any, options: dict[str, Any]) -> tuple[list[list[int]], float]:
    """The texts during which the host is away, and the longest time without a token."""
    came = pause = 0.0
    for number, line in enumerate(asker.ask(prompts=[list(prompt) for prompt in prompts], **options)):
        now = time.monotonic()
        pause = max(pause, now - came) if came else 0.0
        came = now
        if number == 20:
            host.cut()
            time.sleep(CUT)
            host.heal()
        if "texts" in line:
            return line["texts"], pause
    raise AssertionError("no end")
