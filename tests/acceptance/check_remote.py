"""Remote modules beside torch.distributed.rpc: the time of a training step and of an echo, and bytes at the caller."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ralmq
import torch
from checks import Line, check, size
from serving import broker, free_url, worker
from timing import Other, other, spread
from torch import nn

SIZE, ROWS, CALLS, RATE = 256, 32, 10, 1e-3  # as in tests/baselines/rpc_remote.py
ROUNDS = 5
STEPS = 10
JOBS = (("step", 4, STEPS), ("echo", 4 << 10, 200), ("echo", 1 << 20, 50))  # what, bytes, how often
WAYS = ("uv", "all")  # TCP alone; TensorPipe's own choice, shared memory among it


class Ours:
    """The example on two workers, and an echo."""

    def __init__(self) -> None:
        self.layers = []
        for place in range(2):
            torch.manual_seed(place)
            module = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())
            self.layers.append(ralmq.remote_copy(module, f"w{place}"))
        self.optimizer = ralmq.RemoteOptimizer("sgd", self.layers, lr=RATE)
        self.echo = ralmq.remote("nn.Identity", "w0")
        torch.manual_seed(9)
        self.x = torch.randn(ROWS, SIZE)

    def step(self) -> float:
        self.optimizer.zero_grad()
        y: Any = self.x
        for call in range(CALLS):
            y = self.layers[call % 2](y)
        loss = y.pow(2).sum()
        loss.backward()
        self.optimizer.step()
        return float(loss)

    def run(self, what: str, times: int, count: int = 4) -> tuple[float, float]:
        """Seconds of one, and the last value."""
        value, sent = 0.0, torch.zeros(count // 4)
        begun = time.perf_counter()
        for _ in range(times):
            if what == "step":
                value = self.step()
            else:
                with torch.no_grad():
                    value = float(self.echo(sent).to_here()[0])
        return (time.perf_counter() - begun) / times, value


async def asked(system: Other, what: str, times: int, count: int = 4) -> tuple[float, float]:
    process = system._process
    assert process.stdin is not None
    process.stdin.write(json.dumps({"what": what, "times": times, "bytes": count}).encode() + b"\n")
    answer = await system.line()
    return answer["seconds"] / times, answer["value"]


@check
async def remote_modules(folder: Path) -> AsyncIterator[Line]:
    """In turn: a step, an echo of 4 KiB, one of 1 MiB; each of ours and of torch.distributed.rpc both ways."""
    torch.set_num_threads(1)
    took: dict[tuple[str, str, int], list[float]] = {}
    values: dict[str, list[float]] = {name: [] for name in ("ours", *WAYS)}

    def note(way: str, what: str, count: int, found: tuple[float, float]) -> None:
        took.setdefault((way, what, count), []).append(found[0])
        values[way] += [found[1]] if what == "step" else []

    with ExitStack() as stack:
        url = free_url()
        stack.enter_context(broker(folder, url))
        for place in range(2):
            stack.enter_context(worker(folder, url, "module", name=f"w{place}"))
        home = await asyncio.to_thread(ralmq.remote.connect, url, wait=30)
        try:
            ours = await asyncio.to_thread(_ready, Ours)
            async with other("rpc_remote.py", "uv") as tcp:
                for _ in range(size(ROUNDS, 2)):
                    async with other("rpc_remote.py", "all") as shared:  # it takes a core each even while it is idle
                        for what, count, times in JOBS:
                            note("all", what, count, await asked(shared, what, times, count))
                    for what, count, times in JOBS:
                        note("uv", what, count, await asked(tcp, what, times, count))
                        note("ours", what, count, await asyncio.to_thread(ours.run, what, times, count))
            before = home.received
            await asyncio.to_thread(ours.step)
            left = home.received - before
        finally:
            await asyncio.to_thread(ralmq.remote.close)
    for line in _lines(took):
        yield line
    same = max(abs(a - b) / abs(b) for a, b in zip(values["ours"], values["uv"], strict=True))
    yield Line("losses of the example, beside torch.distributed.rpc", "<= 1e-4 apart", f"{same:.1e}", same <= 1e-4)
    yield Line("bytes of tensors at the caller in a step, whose loss is read", "0", f"{left}", left == 0)


def _lines(took: dict[tuple[str, str, int], list[float]]) -> list[Line]:
    found = []
    for what, count, bound, said in (
        ("step", 4, 1.0, "a step of the example"),
        ("echo", 4 << 10, 1.0, "an echo of 4 KiB"),
        ("echo", 1 << 20, 0.9, "an echo of 1 MiB"),
    ):
        own = took["ours", what, count]
        for way in WAYS:
            rates = spread(took[way, what, count], own)
            ratio = statistics.median([a / b for a, b in zip(took[way, what, count], own, strict=True)])
            times = f"{statistics.median(own) * 1e3:.2f} ms, {statistics.median(took[way, what, count]) * 1e3:.2f} ms"
            over = "TCP" if way == "uv" else "shared memory"
            text = f"{said}: times as fast as torch.distributed.rpc over {over}"
            found.append(Line(text, f">= {bound}", f"{rates}; {times}", ratio >= bound))
    return found


def _ready(make: Callable[[], Ours]) -> Ours:
    end = time.monotonic() + 60
    while True:
        try:
            return make()
        except ralmq.errors.RalmqError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
