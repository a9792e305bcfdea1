"""What peers have sent and the broker has not taken: it outlives their deaths, and has a bound."""

import asyncio
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from inprocess import cluster
from ralmq.broker import server as shell
from ralmq.broker import watch as watching
from ralmq.broker.watch import KEPT, Taken, Watch
from ralmq.client.client import Client, connect
from ralmq.schema.errors import NoService
from ralmq.workers.echo import Echo
from serving import PATIENCE, broker, free_url, until

RAW = """
import os, sys, zmq
from ralmq.schema.codec import encode
from ralmq.schema.frame import read_prefix, restamped
from ralmq.schema.message import Hello, Request

context = zmq.Context()

def opened(**options):
    peer = context.socket(zmq.DEALER)
    for name, value in options.items():
        peer.setsockopt(getattr(zmq, name), value)
    peer.connect(sys.argv[1])
    peer.send_multipart(encode(Hello(os.urandom(16), "raw")))
    return peer, read_prefix(peer.recv_multipart()[0]).epoch

def asked(service, epoch):
    (frame,) = encode(Request(service, 4, 0, None, 0, {}, ()), id=os.urandom(16))
    return bytes(restamped(frame, attempt=0, deadline=60_000, epoch=epoch))
"""
CROWD = (
    RAW
    + """
peers = [opened(SNDHWM=0) for _ in range(60)]
for _ in range(1000):
    for peer, epoch in peers:
        peer.send(asked("nobody", epoch))
print("sent", flush=True)
sys.stdin.read()
"""
)
FLOOD = (
    RAW
    + """
peer, epoch = opened(LINGER=0, RECONNECT_IVL=-1, SNDTIMEO=1000, IMMEDIATE=1)
message = asked("echo", epoch)
try:
    for _ in range(4_000_000):
        peer.send(message)
    sys.exit("all of it was taken")
except zmq.Again:
    os._exit(0)  # nobody takes anything any more
"""
)


async def test_a_crowd_that_is_killed_does_not_take_the_broker_along(tmp_path: Path) -> None:
    """60 connections end at once with 1,000 messages each under way: had libzmq stopped reading, it would abort."""
    url = free_url()
    with broker(tmp_path, url) as process:
        for _ in range(3):
            crowd = subprocess.Popen(
                [sys.executable, "-c", CROWD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            try:
                assert crowd.stdout is not None
                assert await asyncio.wait_for(asyncio.to_thread(crowd.stdout.readline), PATIENCE) == "sent\n"
            finally:
                crowd.kill()  # which ends a thread that still reads
                crowd.communicate()
            async with connect(url, wait=PATIENCE) as client:
                with pytest.raises(NoService):
                    await client.request("nobody", deadline=PATIENCE)
        assert process.process is not None and process.process.poll() is None, process.log


async def test_who_sends_more_than_is_taken_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "AHEAD", 16 << 20)
    monkeypatch.setattr(watching, "LONGEST", 8 << 20)
    async with cluster(Echo()) as here:
        client, served = await here.client(), 0
        flood = subprocess.Popen([sys.executable, "-c", FLOOD, here.url])
        try:
            while flood.poll() is None:
                assert (await client.request("echo", {"n": served}, deadline=PATIENCE)).body == {"n": served}
                served += 1
            assert flood.returncode == 0 and served
        finally:
            flood.kill()
            flood.wait()
        await until(lambda: not here.server._ended, "the end of what it had sent")
        assert here.counts["flooding"] == here.counts["lost_peers"] == 1 and not here.counts["endless"]
        assert here.counts["void"], "what was left of it was dropped"
        assert (await client.request("echo", {"n": 0}, deadline=PATIENCE)).body == {"n": 0}


async def test_large_messages_of_many_are_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the broker does not get to the end of what arrives: 12 MiB come from the worker at most."""
    monkeypatch.setattr(watching, "AHEAD", 32 << 20)
    monkeypatch.setattr(watching, "LONGEST", 16 << 20)
    monkeypatch.setattr(shell, "LOOK", 0.0)
    async with cluster(Echo()) as here:
        monkeypatch.setattr(here.server, "_take", lambda sent, take=here.server._take: take(sent) and False)
        large = np.arange(3 << 20, dtype=np.uint8)

        async def ask(client: Client) -> None:
            for _ in range(8):
                reply = await client.request("echo", tensors=[large], deadline=PATIENCE, retries=9)
                assert (reply.tensors[0].numpy() == large).all()

        await asyncio.gather(*[ask(await here.client()) for _ in range(4)])
        taken = here.server._taken
        assert taken and sum(of.bytes for of in taken.values()) > 16 * large.nbytes, "most of it was counted"
        assert not here.counts["flooding"] and not here.counts["lost_peers"]


@pytest.mark.parametrize("sealed", [False, True])
def test_who_is_ahead_is_known_by_what_was_taken(monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    """Messages of 60 bytes on their way, of which five were taken; a message may have 600."""
    got = 1000
    monkeypatch.setattr(watching, "received", lambda descriptor: got)
    monkeypatch.setattr(watching, "LONGEST", 600)
    monkeypatch.setattr(watching, "AHEAD", 1200 + 10 * KEPT)
    monkeypatch.setattr(watching, "CROWDED", 5 * KEPT)
    watch = Watch()
    watch.opened(3)
    watch.mark()
    taken = Taken()

    def ahead(full: bool = False) -> bool:
        return watch.ahead({3: taken, 4: taken}, full) == {3}

    assert not ahead() and watch.ahead({}, True) == set()
    got += 1 << 20
    assert not ahead() and not ahead(), "one message that is under way"
    got = 1000 + 5 * 60 + 1200
    for _ in range(5):
        taken.add([bytes(58 - 33 * sealed)], sealed)
    assert not ahead() and not ahead(), "ten messages, and one under way"
    got += 1
    assert not ahead(), "the broker itself may just have stood still"
    assert ahead()
    got -= 1
    assert not ahead()
    got += 1
    assert not ahead(), "not twice in a row"
    watch.mark()
    got += 5 * 60 + 1201
    assert not ahead() and ahead()
    got -= 1201 - 5 * 60
    assert not ahead(True) and not ahead(True), "five messages"
    got += 60
    assert not ahead() and not ahead() and not ahead(True) and ahead(True)


def test_what_travelled_is_counted_to_the_byte() -> None:
    for sealed, size, expected in ((False, 255, 257), (False, 256, 265), (True, 222, 257), (True, 223, 265)):
        taken = Taken()
        taken.add([bytes(size), bytes(size)], sealed)
        assert (taken.bytes, taken.frames) == (2 * expected, 2)


async def test_a_large_message_behind_many_small_ones_is_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is under way while they are taken, and everything about them is short."""
    monkeypatch.setattr(watching, "AHEAD", 64 << 20)
    monkeypatch.setattr(watching, "LONGEST", 32 << 20)
    monkeypatch.setattr(shell, "LOOK", 0.0)
    async with cluster(Echo()) as here:
        client = await here.client()
        here.server._taken = defaultdict(Taken)
        here.server._watch.mark()
        monkeypatch.setattr(here.server, "_take", lambda sent, take=here.server._take: take(sent) and False)
        step = here.server.core.step
        monkeypatch.setattr(here.server.core, "step", lambda *given: time.sleep(0.0002) or step(*given))
        large = np.zeros(24 << 20, np.uint8)
        asked = [client.request("nobody", {"n": number}, deadline=PATIENCE) for number in range(3000)]
        *refused, reply = await asyncio.gather(
            *asked, client.request("echo", tensors=[large], deadline=PATIENCE, retries=9), return_exceptions=True
        )
        assert all(isinstance(error, NoService) for error in refused)
        assert not isinstance(reply, BaseException) and reply.tensors[0].shape == large.shape
        assert not here.counts["flooding"]
