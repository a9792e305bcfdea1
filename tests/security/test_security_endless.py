"""A message that never ends is cut, on any port, before it costs the broker much, while others are served."""

import asyncio
import contextlib
import socket
from collections import defaultdict
from pathlib import Path

import pytest
import zmq
from inprocess import PACE
from ralmq.broker import server as shell
from ralmq.broker.server import Server
from ralmq.broker.watch import FIRST, LONGEST, Flow, Taken, Watch, received
from ralmq.client import wire
from ralmq.client.client import connect
from ralmq.schema.errors import NoService
from ralmq.schema.keys import Entry
from ralmq.workers.echo import Echo
from ralmq.workers.host import Host
from serving import until

PART = b"\x03" + (65_536).to_bytes(8, "big") + bytes(65_536)  # a frame of ZMTP with more to follow
MOST = 512 << 20  # bytes that the attacker sends at most; a broker that keeps them all fails the test


def attack(url: str, mechanism: bytes) -> int:
    """Sends one endless message; the bytes that it got rid of before it was cut."""
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    ready = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    sent = 0
    with socket.create_connection((host, int(port)), timeout=5) as raw, contextlib.suppress(OSError):
        raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32))
        raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
        heard = b""
        while b"READY" not in heard and (more := raw.recv(4096)):  # a message before that is refused as no handshake
            heard += more
        while sent < MOST:
            raw.sendall(PART)
            sent += len(PART)
    return sent


async def test_without_keys_it_is_cut_after_the_first_bytes() -> None:
    async with Server("tcp://127.0.0.1:*", limits=PACE) as server:
        host = Host(Echo(), server.endpoint, keys="")
        await host.open()
        async with connect(server.endpoint, keys="") as client:
            attacker = asyncio.create_task(asyncio.to_thread(attack, server.endpoint, b"NULL"))
            served = 0
            while not attacker.done():
                assert (await client.request("echo", {"n": served})).body == {"n": served}
                served += 1
            assert await attacker < MOST and served
            assert server.core.requests.counts["endless"] == 1
            assert len(server.core.roster.peers) == 2, "nobody else was cut"
        await host.close()


@pytest.mark.parametrize("mechanism", [b"NULL", b"CURVE"])
async def test_with_keys_nothing_of_it_is_taken(keys: Path, mechanism: bytes) -> None:
    async with Server("tcp://127.0.0.1:*", limits=PACE, keys=keys) as server:
        sent = await asyncio.to_thread(attack, server.endpoint, mechanism)
        assert sent < 16 << 20, "what the kernel buffers"
        assert not server.core.roster.peers


async def test_large_messages_are_not_taken_for_endless_ones() -> None:
    import numpy as np

    async with Server("tcp://127.0.0.1:*", limits=PACE) as server:
        host = Host(Echo(), server.endpoint, keys="")
        await host.open()
        async with connect(server.endpoint, keys="") as client:
            large = np.zeros(48 << 20, np.uint8)
            for _ in range(3):
                assert (await client.request("echo", tensors=[large])).tensors[0].shape == large.shape
        assert not server.core.requests.counts["endless"]
        await host.close()


def test_a_suspect_has_as_much_as_a_message_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    got = 0
    monkeypatch.setattr("ralmq.broker.watch.received", lambda descriptor: got)
    watch = Watch()
    watch.opened(3)
    assert watch.look() == (set(), set())
    got = FIRST
    assert watch.look() == (set(), set())
    got += 1
    assert watch.look() == (set(), {3}), "no HELLO is so long"
    watch.whole(3)
    got += FIRST
    assert watch.look() == (set(), set()), "not more than is harmless since its last message"
    got += 1
    assert watch.look() == ({3}, set())
    got += LONGEST
    assert watch.look() == (set(), set())
    got += 1
    assert watch.look() == (set(), {3})
    watch.whole(3)
    got += LONGEST + 1
    assert watch.look() == ({3}, set()), "it ended after all, and this is the next one"
    watch.closed(3)
    got += LONGEST + 1
    assert watch.look() == (set(), set())
    watch.whole(3)
    assert watch.look() == (set(), set()), "no connection of that number"


def test_what_is_no_tcp_connection_has_received_nothing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, socket.socket(socket.AF_UNIX) as unix:
        assert received(file.fileno()) == received(unix.fileno()) == received(-1) == 0
    assert Flow() == Flow(0, -1, False, 0, False)


async def test_a_connection_whose_key_changes_begins_anew() -> None:
    """A routing id is used again by whoever comes next: nothing of the one before is his."""
    async with Server("inproc://changes") as server:
        first, second = (Entry(name, "client", name * 40) for name in "ab")
        assert server.core.introduce(0.0, b"peer", first) == []
        assert server.core.introduce(0.0, b"peer", Entry("a", "client", "a" * 40)) == []
        server.core.introduce(0.0, b"peer", second)
        assert server.core.roster.entries == {b"peer": second}


@pytest.mark.parametrize("with_keys", [False, True])
async def test_what_was_taken_is_what_was_received(
    keys: Path, monkeypatch: pytest.MonkeyPatch, with_keys: bool
) -> None:
    """By the kernel's own count, to the byte, over a real connection without heartbeats."""
    monkeypatch.setattr(shell, "HEARTBEAT_MS", 0)
    monkeypatch.setattr(wire, "_OPTIONS", tuple(pair for pair in wire._OPTIONS if pair[0] != zmq.HEARTBEAT_IVL))
    async with (
        Server("tcp://127.0.0.1:*", limits=PACE, keys=keys if with_keys else None) as server,
        connect(server.endpoint, keys=keys if with_keys else "") as client,
    ):
        (number,) = server._descriptors.values()
        server._look_at = float("inf")  # who is not behind counts nothing
        server._taken = defaultdict(Taken)
        start = received(number)
        for size in (10, 100, 1000, 300, 200) * 8:
            with pytest.raises(NoService):
                await client.request("nobody", {"text": "x" * size})
        (taken,) = server._taken.values()
        assert taken.frames >= 40
        await until(lambda: received(number) - start == taken.bytes, "each byte in a message")
