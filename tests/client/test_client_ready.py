"""A worker that was forgotten is announced again once it can serve; one that never will ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_broker import FakeBroker
from ralmq import errors
from ralmq.schema.message import Error, Gone, Hello, Request
from ralmq.workers.base import Answer
from ralmq.workers.base import Request as Asked
from ralmq.workers.host import Host
from serving import until
from workers_for_tests import Gate


class Busy(Gate):
    """Ready again once `calm` is set, unless it is `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.calm = asyncio.Event()
        self.broken = False
        self.waits = 0

    async def ready(self) -> None:
        self.waits += 1
        await self.calm.wait()
        if self.broken:
            raise errors.WorkerFailed("its device hangs")


@asynccontextmanager
async def announced(fake: FakeBroker, worker: Gate, **options: Any) -> AsyncIterator[Host]:
    host = Host(worker, fake.url, **options)
    opening = asyncio.create_task(host.open())
    await fake.welcome(beat_ms=60_000)
    await opening
    yield host
    await host.close()


def hellos(fake: FakeBroker) -> int:
    return sum(isinstance(message, Hello) for _, message in fake.arrived())


async def test_it_is_not_announced_before_it_is_ready() -> None:
    busy = Busy()
    with FakeBroker() as fake:
        async with announced(fake, busy):
            fake.send(Gone("no progress"))
            await until(lambda: busy.waits == 1)
            await asyncio.sleep(1.2)  # HELLO is repeated each half second
            assert hellos(fake) == 0
            busy.calm.set()
            await fake.welcome(beat_ms=60_000)
            fake.send(Gone("once more"))
            await fake.welcome(beat_ms=60_000)
            assert busy.waits == 2
        fake.hold_up()
        assert hellos(fake) == 0


async def test_one_that_is_closed_meanwhile_does_not_come_back() -> None:
    busy = Busy()
    with FakeBroker() as fake:
        async with announced(fake, busy):
            fake.send(Gone())
            await until(lambda: busy.waits == 1)
        busy.calm.set()
        fake.hold_up()
        await asyncio.sleep(0)
        assert hellos(fake) == 0


@pytest.mark.parametrize("told", [True, False])
async def test_one_that_never_will_be_ready_ends(told: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever runs it is told, and ends it; else its host closes itself."""
    busy, failures = Busy(), []
    busy.broken = True
    busy.calm.set()
    with FakeBroker() as fake:
        async with announced(fake, busy, **({"failed": failures.append} if told else {})) as host:
            fake.send(Gone())
            await until(lambda: failures if told else host._closed)
            assert [str(error) for error in failures] == ["its device hangs"] * told
            assert host._closed != told and caplog.text.count("can serve no more: its device hangs") == (not told)
        fake.hold_up()
        assert hellos(fake) == 0


async def test_who_was_lost_is_told_to_the_asker() -> None:
    """A worker's own request lost a worker: whoever asked can tell by its name the dead from the cut off."""

    class Lost(Gate):
        async def handle(self, request: Asked) -> Answer:
            raise errors.WorkerLost("its stages were lost", worker="stage-abcd")

    with FakeBroker() as fake:
        async with announced(fake, Lost()):
            fake.send(Request("gate"), id=b"r" * 16)
            error = (await fake.receive(Error))[1]
            assert (error.code, error.worker) == ("worker_lost", "stage-abcd")
