"""A peer that reads nothing of large answers: what a broker holds for it is bounded in bytes, wherever it lies."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import zmq
from inprocess import Cluster, cluster
from ralmq.broker import server as shell
from ralmq.broker.flights import LARGE, Flights
from ralmq.broker.limits import Limits
from ralmq.broker.outbox import Outbox
from ralmq.schema.codec import decode, encode
from ralmq.schema.frame import Prefix, read_prefix, restamped
from ralmq.schema.message import Hello, Kind, Request
from ralmq.workers.base import Worker
from serving import until

MIB = 1 << 20
SIZE = 4 * MIB
COUNT = 20


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads nothing may not answer heartbeats either, and would be cut off for that."""
    monkeypatch.setattr(shell, "HEARTBEAT_MS", 0)


class Large(Worker):
    """Answers with 4 MiB, once it may."""

    service = "large"
    capacity = 64

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.may.set()

    async def handle(self, request: Any) -> Any:
        await self.may.wait()
        return {"n": request.body["n"]}, [np.full(SIZE, request.body["n"], np.uint8)]


class Reader:
    """A client that reads nothing until it is told to."""

    def __init__(self, url: str) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.RCVHWM, 1), (zmq.RCVBUF, 65_536), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._socket.connect(url)

    async def open(self) -> None:
        self._socket.send_multipart(encode(Hello(os.urandom(16), "reader")))
        prefix, _ = await self.next()
        self._epoch = prefix.epoch

    def ask(self, number: int) -> None:
        identity = os.urandom(16)
        frames = encode(Request("large", 4, 0, None, 0, {"n": number}, ()), id=identity)
        head = restamped(frames[0], attempt=0, deadline=60_000, epoch=self._epoch)
        self._socket.send_multipart([head, *frames[1:]])

    async def next(self) -> tuple[Prefix, Any]:
        frames = await asyncio.to_thread(self._socket.recv_multipart)
        prefix = read_prefix(frames[0])
        return (prefix, decode(frames)[1])

    async def answers(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            prefix, message = await self.next()
            if prefix.kind == Kind.FINAL:
                values = message.tensors[0].numpy()
                assert values.shape == (SIZE,) and (values == message.body["n"]).all()
                found.append(message.body["n"])
        return found

    async def close(self) -> None:
        self._socket.close(0)
        await asyncio.to_thread(self._context.term)


@asynccontextmanager
async def unread() -> AsyncIterator[tuple[Cluster, Reader]]:
    """A worker of large answers, and a client that has read none of 20."""
    async with cluster(Large()) as here:
        reader = Reader(here.url)
        try:
            await reader.open()
            for number in range(COUNT):
                reader.ask(number)
            await until(lambda: here.counts["accepted"] == COUNT, "all requests")
            await here.idle()
            yield here, reader
        finally:
            await reader.close()


def flying(here: Cluster) -> int:
    return sum(flight.size for of in here.server._flights._flights.values() for flight in of)


def held(here: Cluster) -> int:
    return sum(here.server._outbox._bytes.values())


async def test_libzmq_gets_few_bytes_and_the_rest_waits_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 messages are below the high-water mark: it alone would let all of them through."""
    monkeypatch.setattr(shell, "FLYING", 16 * MIB)
    async with unread() as (here, reader):
        assert flying(here) <= 16 * MIB
        assert held(here) >= (COUNT - 6) * SIZE, "what is neither with libzmq nor in the kernel's buffers"
        assert await reader.answers(COUNT) == list(range(COUNT))
        await until(lambda: not here.server._flights and not here.server._outbox, "nothing under way")
        assert not here.counts["lost_peers"]


async def test_who_takes_nothing_is_let_go_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "FLYING", 16 * MIB)
    monkeypatch.setattr(shell, "OUT_BYTES", 32 * MIB)
    async with unread() as (here, _):
        assert here.counts["lost_peers"] == 1 and not held(here)
        assert [peer.works for peer in here.server.core.roster.peers.values()] == [True], "nobody else"
        client = await here.client()
        assert (await client.request("large", {"n": 3})).body == {"n": 3}
    assert not here.server._flights or all(
        flight.left.done for of in here.server._flights._flights.values() for flight in of
    )


async def test_above_the_watermark_less_is_held_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "FLYING", 4 * MIB)
    monkeypatch.setattr(shell, "OUT_FULL", 8 * MIB)
    worker = Large()
    worker.may.clear()
    async with cluster(worker, limits=Limits(beat=0.1, memory=1 << 40)) as here:
        reader = Reader(here.url)
        await reader.open()
        for number in range(8):
            reader.ask(number)
        await until(lambda: here.counts["accepted"] == 8, "all requests")
        monkeypatch.setattr(shell, "resident", lambda: 1 << 41)
        here.server._look()
        worker.may.set()
        await until(lambda: here.counts["lost_peers"] == 1, "its loss")
        await reader.close()


def test_one_large_message_passes_whatever_its_size() -> None:
    flights = Flights(10)
    assert flights.room(b"a", 1000)
    frames, left = flights.watched([b"head", b"x" * 100])
    flights.add(b"a", 104, left)
    assert [bytes(frame) for frame in frames] == [b"head", b"x" * 100]
    assert not flights.room(b"a", 1) and flights.room(b"b", 1000)
    flights.tidy()
    assert len(flights) == 1
    del frames
    assert left.wait(5) is None
    assert flights.room(b"a", 1000)
    flights.tidy()
    assert not flights


def test_the_bound_of_an_outbox_may_change() -> None:
    outbox = Outbox(1000)
    assert outbox.hold(b"a", [bytes(300)])
    outbox.bound(500)
    assert not outbox.hold(b"a", [b"x"]) and outbox.hold(b"b", [bytes(100)])
    outbox.bound(1000)
    assert outbox.hold(b"a", [b"x"])


def test_small_messages_are_bounded_by_their_number() -> None:
    assert LARGE * shell.HIGH_WATER <= 2 * shell.FLYING
