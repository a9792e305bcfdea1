"""Every process of a cluster is replaced, one after the other, while it works: no request fails."""

import asyncio
import contextlib
import itertools
import signal
from collections import Counter
from pathlib import Path

import ralmq
from ralmq.client.client import Client
from serving import Process, broker, free_url, until, worker


class Load:
    """Askers that go on until they are told to stop; each outcome is counted."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.ended: Counter[str] = Counter()
        self.failed: list[str] = []
        self._on = True
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Load":
        makers = [self._echo] * 6 + [self._generate] * 2
        self._tasks = [asyncio.create_task(self._go(make, n)) for n, make in enumerate(makers)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._on = False
        await asyncio.gather(*self._tasks)

    async def more(self) -> None:
        """Waits until everything works again: some of each have ended after this moment."""
        goal = {kind: self.ended[kind] + 3 for kind in ("echo", "generate")}
        await until(lambda: all(self.ended[kind] >= count for kind, count in goal.items()), f"more than {goal}", 60.0)

    async def _go(self, make: object, number: int) -> None:
        for turn in itertools.count():
            if not self._on:
                return
            try:
                await make(number, turn)  # type: ignore[operator]
            except ralmq.RalmqError as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                return

    async def _echo(self, number: int, turn: int) -> None:
        body = {"n": [number, turn]}
        reply = await self.client.request("echo", body, deadline=60, retries=20)
        assert reply.body == body
        self.ended["echo"] += 1

    async def _generate(self, number: int, turn: int) -> None:
        prompt = [65 + number, 66, 67 + turn % 5]
        tokens = [
            token
            async for token in self.client.generate(
                prompt, model="demo", max_tokens=12, ignore_eos=True, deadline=120, wait_service=60, retries=20
            )
        ]
        positions = [token.position for token in tokens if token.id >= 0]
        assert positions == sorted(set(positions)) and len(positions) == 12
        self.ended["generate"] += 1


def test_no_request_fails_while_every_process_is_replaced(tmp_path: Path) -> None:
    asyncio.run(_replaced(tmp_path))


async def _replaced(tmp_path: Path) -> None:
    url = free_url()
    makers = {
        "echo 1": lambda: worker(tmp_path, url, "echo", delay_ms=20),
        "echo 2": lambda: worker(tmp_path, url, "echo", delay_ms=20),
        "stage 0": lambda: worker(tmp_path, url, "stage", model="demo", stage="0/2", threads=1),
        "stage 1": lambda: worker(tmp_path, url, "stage", model="demo", stage="1/2", threads=1),
        "generator 1": lambda: worker(tmp_path, url, "generator", model="demo"),
        "generator 2": lambda: worker(tmp_path, url, "generator", model="demo"),
    }
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(broker(tmp_path, url))
        running: dict[str, Process] = {name: stack.enter_context(make()) for name, make in makers.items()}
        async with ralmq.connect(url, wait=60) as client:
            await until(lambda: _ready(client, 6), within=60.0)
            async with Load(client) as load:
                await load.more()
                for name, make in makers.items():
                    old = running[name]
                    if name == "echo 2":  # asked through the broker instead of by a signal
                        await client.request("ralmq.drain", {"worker": await _name(client, old.pid)})
                    else:
                        old.send(signal.SIGTERM)
                    running[name] = stack.enter_context(make())
                    assert await old.ended() == 0, old.log
                    await until(lambda: _ready(client, 6), within=60.0)
                    await load.more()
                assert load.failed == [], "the broker stayed"
                counts = (await client.status())["broker"]["counts"]
                assert not {"worker_lost", "requeued", "poisoned"} & set(counts), "what was in hand was finished"
                hub.send(signal.SIGTERM)
                assert await hub.ended() == 0
                hub = stack.enter_context(broker(tmp_path, url))
                await load.more()
            assert load.failed == [], "the broker was replaced, too"


async def _ready(client: Client, count: int) -> bool:
    status = await client.status()
    states = Counter(worker["state"] for worker in status["workers"])
    return states["ready"] == count and all(pipeline["formed"] for pipeline in status["pipelines"])


async def _name(client: Client, pid: int) -> str:
    (name,) = [worker["name"] for worker in (await client.status())["workers"] if worker["pid"] == pid]
    return str(name)
