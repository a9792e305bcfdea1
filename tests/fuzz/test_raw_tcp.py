"""Strangers at the port of a running broker, while a client is served over the same: each of its requests is answered.

A message that never ends is in tests/security.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from commands import ralmq
from fuzz.attackers import CANARY, Siege, half_open
from ralmq.client.client import Client, connect
from ralmq.workers.echo import Echo
from ralmq.workers.host import Host
from serving import Process, free_url, until

ROUNDS = 30  # connections of each kind, at least
REQUESTS = 100  # of the client, at least
HALF_OPEN = 100
GROWTH = 64 << 20  # bytes of memory that the broker may have gained
PRIVATE = "prompt-of-the-client"


def resident(process: Process) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096


def descriptors(process: Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


@asynccontextmanager
async def served(folder: Path, keys: Path | None) -> AsyncIterator[tuple[Process, str, Client]]:
    """A broker's process with a worker and a client."""
    url = free_url()
    with Process(folder, "broker", "--bind", url, *(["--keys", str(keys)] if keys else [])) as process:
        host = Host(Echo(), url, keys=keys / "worker.key" if keys else "")
        await host.open()
        try:
            async with connect(url, wait=30, keys=keys / "admin.key" if keys else "") as client:
                yield process, url, client
        finally:
            await host.close()


async def asked_during(client: Client, siege: Siege) -> int:
    """Asks until there were enough of both; every request has to be answered by what it asked."""
    answered = 0
    while answered < REQUESTS or min(siege.rounds) < ROUNDS:
        text = f"{PRIVATE} {answered}"
        reply = await client.request("echo", {"text": text}, deadline=20)
        assert reply.body == {"text": text}
        answered += 1
    return answered


@pytest.mark.parametrize("guarded", [False, True], ids=["without keys", "with keys"])
async def test_strangers_neither_stop_nor_fill_the_broker(tmp_path: Path, guarded: bool) -> None:
    keys = None
    if guarded:
        keys = tmp_path / "keys"
        assert ralmq("keys", "init", str(keys), home=tmp_path).returncode == 0
    async with served(tmp_path, keys) as (process, url, client):
        host, _, port = url.removeprefix("tcp://").rpartition(":")
        address = (host, int(port))
        await client.request("echo", {"text": "warm"})
        memory, open_before = resident(process), descriptors(process)
        before = (await client.status())["broker"]
        with half_open(address, HALF_OPEN):
            await until(lambda: descriptors(process) >= open_before + HALF_OPEN, "the half-open connections")
            with Siege(address) as siege:
                answered = await asked_during(client, siege)
        await until(lambda: descriptors(process) <= open_before, "the end of their connections")
        told = await client.status()
        counts = told["broker"]["counts"]
        assert counts["accepted"] == answered + 1, "nothing else was taken for a request"
        assert told["broker"]["clients"] == before["clients"] and len(told["workers"]) == 1, "no stranger is a peer"
        if guarded:
            assert not counts.get("malformed"), "nothing of theirs was delivered"
            assert counts["no_handshake"] >= 2 * ROUNDS
        else:
            assert counts["malformed"] >= ROUNDS, "what has no form is answered"
        assert resident(process) - memory < GROWTH
        log = process.log
        assert CANARY.decode() not in log and PRIVATE not in log and len(log) < 10_000
