"""Doors and lanes: order, large frames, who is let in, and what is told when the other side is gone."""

import asyncio
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from ralmq.schema.errors import Refused
from ralmq.schema.message import Direct
from ralmq.workers.direct import near
from ralmq.workers.direct.address import here, is_local, known, towards
from ralmq.workers.direct.door import Door
from ralmq.workers.direct.lane import Lane
from ralmq.workers.direct.memory import LEAST, SLOTS, Slots
from ralmq.workers.direct.near import CHUNK, SCHEME, Stream, connected
from relay import Relay
from serving import until

LARGE = np.arange(LEAST, dtype=np.int32).view(np.uint8)
ELSEWHERE = {"host": "another"}


class Here:
    """A door, what came through it, and lanes to it."""

    def __init__(self, **options: Any) -> None:
        self.came: list[list[bytes]] = []
        self.cuts: list[str] = []
        self.door = Door(lambda frames: self.came.append([bytes(frame) for frame in frames]), **options)
        self.lanes: list[Lane] = []

    def lane(self, **changes: str) -> Lane:
        self.lanes.append(Lane(self.door.direct._replace(**changes), self.cuts.append))
        return self.lanes[-1]


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Here]:
    it = Here(**options)
    try:
        yield it
    finally:
        for lane in it.lanes:
            lane.close()
        it.door.close()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"far": "127.0.0.1"}, ELSEWHERE),
        ({"far": "127.0.0.1", "secure": False}, ELSEWHERE),
        ({"far": "[::1]"}, ELSEWHERE),
    ],
    ids=["near", "curve", "tcp", "ipv6"],
)
async def test_messages_keep_their_order_and_their_bytes(options: dict[str, Any], changes: dict[str, str]) -> None:
    async with opened(**options) as here:
        lane = here.lane(**changes)
        assert lane.near is not bool(changes)
        sent = [[b"%d" % number, *([LARGE.data] if number % 7 == 0 else [b""])] for number in range(200)]
        for frames in sent:
            lane.send(frames)
        await until(lambda: len(here.came) == 200)
        assert here.came == [[bytes(frame) for frame in frames] for frames in sent]
        assert not here.cuts and not here.door.refused


async def test_memory_comes_back_to_the_sender() -> None:
    async with opened() as here:
        lane = here.lane()
        for number in range(5 * SLOTS):
            lane.send([b"%d" % number, LARGE.data])
            await until(lambda: not any(slot.busy for slot in lane._slots._slots))  # type: ignore[union-attr]
        assert len(here.came) == 5 * SLOTS and len(lane._slots._slots) == 1  # type: ignore[union-attr]


async def test_without_the_key_nothing_comes_through() -> None:
    async with opened(far="127.0.0.1") as here:
        public, _ = zmq.curve_keypair()
        here.lane(**ELSEWHERE, key=public.decode()).send([b"a wrong key"])
        here.lane(**ELSEWHERE, key="").send([b"no key"])
        here.lane(**ELSEWHERE).send([b"the key"])
        await until(lambda: here.came)
        await until(lambda: here.cuts)
        assert here.came == [[b"the key"]]


async def test_noise_at_the_door_harms_nobody() -> None:
    async with opened() as here:
        name = here.door.direct.near.removeprefix(SCHEME)
        ended: list[int] = []
        stranger = Stream(connected(name), lambda frames: None, lambda: ended.append(1))
        stranger.send([b"\xff", b"x"])
        stranger.send([b""])
        await until(lambda: here.door.refused == 2)
        assert not here.came and not ended, "behind a message that cannot be read there is a gap"
        stranger.close()
        for noise in (b"\0\0\0\0", b"\xff\xff\xff\xff", struct.pack("<2I", 1, 1 << 31), struct.pack("<I", 65)):
            with connected(name) as raw:
                raw.send(noise)
                raw.settimeout(10)
                assert (await asyncio.to_thread(raw.recv, 100)).endswith(b"here")
                assert await asyncio.to_thread(raw.recv, 100) == b"", "the door hangs up"
        here.lane().send([b"sound"])
        await until(lambda: here.came[-1:] == [[b"sound"]])


@pytest.mark.parametrize("size", [1, 100, CHUNK - 8, CHUNK, CHUNK + 1, 3 * CHUNK])
async def test_messages_are_cut_anywhere(size: int) -> None:
    """They come byte by byte, or many at once; a reader that is slow, and what it leaves, changes nothing."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    came: list[list[bytes]] = []
    stream = Stream(theirs, lambda frames: came.append([bytes(frame) for frame in frames]), lambda: None)
    sent = [[bytes([number]) * size, b"", bytes([number])] for number in range(5)]
    raw = b"".join(struct.pack("<4I", 3, *map(len, frames)) + b"".join(frames) for frames in sent)
    step = 1 if size <= 100 else size // 3 + 1
    try:
        for begin in range(0, len(raw), step):
            await asyncio.get_running_loop().sock_sendall(ours, raw[begin : begin + step])
            await asyncio.sleep(0)
        await until(lambda: len(came) == 5)
        assert came == sent
    finally:
        stream.close()
        ours.close()


async def test_what_the_socket_does_not_take_at_once_leaves_later() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = Stream(ours, lambda frames: None, lambda: None)
    came: list[list[bytes]] = []
    sent = [[b"%d" % number, bytes(300_000)] for number in range(20)]
    for frames in sent:
        stream.send(frames)
    assert stream._out, "more than the socket holds"
    other = Stream(theirs, lambda frames: came.append([bytes(frame) for frame in frames]), lambda: None)
    try:
        await until(lambda: len(came) == 20)
        assert came == sent and not stream._out
    finally:
        stream.close()
        other.close()


async def test_threads_send_whole_messages_each_in_its_order_and_may_change_them_at_once() -> None:
    ours, theirs = socket.socketpair()
    stream = Stream(ours, lambda frames: None, lambda: None)
    came: list[list[bytes]] = []
    other = Stream(theirs, lambda frames: came.append([bytes(frame) for frame in frames]), lambda: None)

    def send(thread: int) -> None:
        own = bytearray(100_000)
        for number in range(40):
            own[:] = bytes([number]) * len(own)
            stream.send([b"%d" % thread, own])
            own[:] = b"x" * len(own)

    try:
        await asyncio.gather(*[asyncio.to_thread(send, thread) for thread in range(4)])
        await until(lambda: len(came) == 160)
        for thread in range(4):
            assert [body for name, body in came if name == b"%d" % thread] == [bytes([n]) * 100_000 for n in range(40)]
    finally:
        stream.close()
        other.close()


async def test_what_was_sent_before_an_end_is_heard_though_nothing_can_be_sent_there() -> None:
    ours, theirs = socket.socketpair()
    came: list[Any] = []
    stream = Stream(ours, lambda frames: came.append(bytes(frames[0])), lambda: came.append("the end"))
    try:
        with theirs:
            for number in range(3):
                theirs.send(struct.pack("<2I", 1, 1) + b"%d" % number)
        stream.send([b"to nobody"])
        await until(lambda: len(came) == 4)
        assert came == [b"0", b"1", b"2", "the end"]
    finally:
        stream.close()


async def test_memory_is_read_for_this_host_alone() -> None:
    """Who reaches the port names no memory of this machine."""
    async with opened(far="127.0.0.1", secure=False) as here:
        slots = Slots()
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(here.door.direct.far)
            stranger.send_multipart(slots.placed([b"head", LARGE.data]))
            await until(lambda: here.door.refused or here.came)
            assert here.door.refused == 1 and not here.came
        slots.close()


async def test_nothing_follows_where_something_was_lost() -> None:
    """Not even where the other side could be reached again: it would compute with a gap."""
    async with opened(far="127.0.0.1") as here, Relay(here.door.direct.far) as relay:
        lane = here.lane(**ELSEWHERE, far=relay.url)
        lane.send([b"first"])
        await until(lambda: here.came)
        relay.cut()
        for _ in range(50):
            lane.send([b"later"])
            await asyncio.sleep(0.01)
        assert here.cuts and here.came == [[b"first"]] and relay.connections == 1


async def test_a_door_that_closes_is_told() -> None:
    async with opened() as here:
        lane = here.lane()
        lane.send([b"first"])
        await until(lambda: here.came)
        here.door.close()
        await until(lambda: here.cuts)
        assert here.cuts[0] == f"its connection to {lane.url} has ended"


async def test_who_comes_while_no_descriptor_is_left_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The listener asks again after a pause, not at once and without an end."""
    monkeypatch.setattr(near, "PAUSE", 0.2)
    async with opened() as here:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open(os.devnull, os.O_RDONLY)
        lane = here.lane()  # its own descriptor is the last one
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            lane.send([b"kept"])
            await asyncio.sleep(0.1)
            assert not here.came and len(caplog.records) == 1 and "ulimit -n" in caplog.text
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: here.came)
        assert here.came == [[b"kept"]] and len(caplog.records) == 1


async def test_nobody_can_be_reached_where_no_address_leads() -> None:
    with pytest.raises(Refused, match="another host"):
        Lane(Direct("another", "", "ipc://@x", ""), print)
    with pytest.raises(Refused, match=re.escape("-o address=IP")):
        Door(print, far="192.0.2.1")  # an address that is nobody's


def test_addresses_that_users_give() -> None:
    assert [known(given) for given in ("10.0.0.1", "eth0", "::1", "[::1]")] == ["10.0.0.1", "eth0", "[::1]", "[::1]"]
    for everywhere in ("0.0.0.0", "*", "::", "[::]"):
        with pytest.raises(Refused, match="by which the others reach it"):
            known(everywhere)


def test_where_this_machine_is() -> None:
    assert here() == here() and str(os.getuid()) == here().rpartition("/")[2]
    assert [is_local(url) for url in ("ipc://x", "tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://10.0.0.1:1")] == [
        True,
        True,
        True,
        False,
    ]
    assert towards("tcp://127.0.0.9:5555") == "127.0.0.1"
    with pytest.raises(Refused, match=re.escape("-o address=IP")):
        towards("tcp://no-such-host.invalid:5555")


CHILD = """
import asyncio, sys
import numpy as np
from ralmq.schema.message import Direct
from ralmq.workers.direct.lane import Lane
async def main():
    lane = Lane(Direct(*sys.argv[1:]), print)
    while True:
        lane.send([b"x", np.zeros(1 << 20, np.uint8).data])
        await asyncio.sleep(0.01)
asyncio.run(main())
"""


async def test_nothing_is_left_of_a_killed_sender() -> None:
    """Neither memory nor files: what it had is mapped here as long as it is used here."""
    async with opened() as here:
        before = set(Path("/dev/shm").iterdir()) | set(Path("/tmp").glob("*ralmq-direct*"))
        child = subprocess.Popen([sys.executable, "-c", CHILD, *here.door.direct])
        await until(lambda: len(here.came) > 5)
        assert list(Path(f"/proc/{child.pid}/fd").iterdir())
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert set(Path("/dev/shm").iterdir()) | set(Path("/tmp").glob("*ralmq-direct*")) == before
        here.lane().send([b"next"])
        await until(lambda: here.came[-1] == [b"next"])
