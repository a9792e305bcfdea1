"""What a worker's author gets wrong most easily, and what it may not cost: each mistake is told, nothing hangs."""

from typing import Any

import pytest
import ralmq
from inprocess import cluster
from ralmq import errors
from ralmq.schema.message import Beat
from ralmq.workers.host import Host


class Nameless(ralmq.Worker):
    async def handle(self, request: ralmq.Request) -> dict[str, Any]:
        return {}


class Plain(ralmq.Worker):
    """A `handle_batch` that was written without async."""

    service = "plain"
    max_batch = 4

    def handle_batch(self, requests: list[ralmq.Request]) -> list[Any]:  # type: ignore[override]
        return [{} for _ in requests]


class Talkative(ralmq.Worker):
    """Its own BEAT raises."""

    service = "talkative"

    def __init__(self) -> None:
        self.beats = 0

    def beat(self, beat: Beat) -> Beat:
        self.beats += 1
        raise ValueError("no gauge today")

    async def handle(self, request: ralmq.Request) -> dict[str, Any]:
        return {"beats": self.beats}


class Exhausted(ralmq.Worker):
    """Asks an iterator for more than it has, where no coroutine makes another error of that."""

    service = "exhausted"

    def handle(self, request: ralmq.Request) -> Any:
        return next(iter([]))


class Exhausting(ralmq.Worker):
    service = "exhausting"
    max_batch = 4

    async def handle_batch(self, requests: list[ralmq.Request]) -> list[Any]:
        return [StopIteration("no more") for _ in requests]


@pytest.mark.parametrize("kind", [Exhausted, Exhausting])
async def test_an_iterator_that_has_no_more_is_told_to_the_asker(kind: type[ralmq.Worker]) -> None:
    """A future takes no StopIteration."""
    async with cluster(kind()) as here:
        client = await here.client()
        for _ in range(2):
            with pytest.raises(errors.WorkerFailed, match="StopIteration"):
                await client.request(kind.service, {}, deadline=20)


async def test_a_class_without_a_service_is_refused() -> None:
    with pytest.raises(errors.Refused, match="Nameless serves nothing: give the class"):
        await Host(Nameless(), "tcp://127.0.0.1:1").open(0.1)


async def test_a_batch_handler_that_is_not_async_is_told_to_each_asker() -> None:
    async with cluster(Plain()) as here:
        client = await here.client()
        for _ in range(2):
            with pytest.raises(errors.WorkerFailed, match="TypeError"):
                await client.request("plain", {}, deadline=20)


async def test_a_beat_that_raises_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(Talkative()) as here:
        client = await here.client()
        while (await client.request("talkative", {})).body["beats"] < 2:
            pass
    assert "cannot say how it is" in caplog.text


async def test_a_resend_after_busy_never_outlives_the_call() -> None:
    """The place that the broker promises lies behind the deadline: Busy at once, not a wait beyond it."""

    class Never(ralmq.Worker):
        service = "never"
        calls = 0

        async def handle(self, request: ralmq.Request) -> dict[str, Any]:
            Never.calls += 1
            raise errors.Busy("come again later", retry_after=1000.0)

    async with cluster(Never()) as here:
        client = await here.client()
        with pytest.raises(errors.Busy):
            await client.request("never", {}, deadline=5, retries=9)
        with pytest.raises(errors.Busy):
            async for _ in client.stream("never", {}, deadline=5, retries=9):
                pass
    assert Never.calls == 2
