"""Doors that do not answer: whoever asks there is told."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from ralmq.remote import straight
from ralmq.remote.straight import Straight
from ralmq.schema.errors import WorkerLost

CHILD = """
import asyncio
from ralmq.remote.straight import Straight
async def main():
    door = Straight(serve=lambda body, tensors, answer: None)
    print(door.near, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


def test_every_question_to_a_process_that_ended_is_answered() -> None:
    """Also those that a new lane is made for: it is never met."""
    asyncio.run(asked_after_the_end())


async def asked_after_the_end() -> None:
    ended: list[Any] = []
    lost: list[str] = []
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    near = child.stdout.readline().strip()
    here = Straight(lost=lost.append)
    try:
        here.ask(near, {}, [], ended.append)
        await until(lambda: not here._unmet)
        child.kill()
        for _ in range(40):
            here.ask(near, {}, [], ended.append)
            await asyncio.sleep(0.002)
        await until(lambda: len(ended) == 41)
        assert all(isinstance(end, WorkerLost) for end in ended) and near in lost
    finally:
        here.close()
        child.kill()
        child.communicate()


def test_a_door_that_nobody_is_behind_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a process that was stopped: its socket takes connections, and says nothing."""
    monkeypatch.setattr(straight, "MEET", 0.2)
    asyncio.run(asked_in_vain())


async def asked_in_vain() -> None:
    ended: list[Any] = []
    here = Straight()
    name = f"ralmq-{os.urandom(8).hex()}"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("\0" + name)
        silent.listen()
        try:
            here.ask(f"ipc://@{name}", {}, [], ended.append)
            await until(lambda: bool(ended))
            assert isinstance(ended[0], WorkerLost) and not here._unmet and not here._lanes
        finally:
            here.close()
