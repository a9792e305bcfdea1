"""The link against a broker that a test plays: handshake, epochs, attempts, and what comes in the wrong order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import ralmq
from fake_broker import FakeBroker
from ralmq import errors
from ralmq.client.client import Client
from ralmq.schema.codec import encode
from ralmq.schema.frame import PREFIX
from ralmq.schema.limits import VERSION
from ralmq.schema.message import Beat, Bye, Cancel, Credit, Error, Final, Gone, Hello, Partial, Request, Welcome
from ralmq.workers.host import Host
from serving import PATIENCE, free_url, until
from workers_for_tests import Count, Gate


@asynccontextmanager
async def linked(fake: FakeBroker, beat_ms: int = 60_000) -> AsyncIterator[Client]:
    """A client that the fake has welcomed; its own BEATs come so seldom that they do not disturb."""
    client = ralmq.connect(fake.url)
    opening = asyncio.create_task(client.__aenter__())
    await fake.welcome(beat_ms=beat_ms)
    await opening
    try:
        yield client
    finally:
        await client.__aexit__(None, None, None)


async def test_hello_is_repeated_until_welcome_comes() -> None:
    with FakeBroker() as fake:
        opening = asyncio.create_task(ralmq.connect(fake.url).__aenter__())
        first = (await fake.receive(Hello))[1]
        second = (await fake.receive(Hello))[1]
        assert first == second and first.pid > 0 and not first.services
        fake.send(Welcome())
        client = await opening
        pending = client.stream("echo")
        await fake.receive(Request)
        fake.send(Welcome())  # the answer to the other HELLO: nothing is repeated for it
        fake.hold_up()
        await asyncio.sleep(0.05)
        del pending
        await fake.receive(Cancel)
        await client.__aexit__(None, None, None)
        await fake.receive(Bye)


async def test_a_broker_that_comes_late_finds_one_hello() -> None:
    url = free_url()
    opening = asyncio.create_task(ralmq.connect(url, wait=30).__aenter__())
    await asyncio.sleep(1.6)  # several times as long as until HELLO would be repeated
    with FakeBroker(url=url) as fake:
        await until(fake.arrived)
        assert len(fake.taken()) == 1
        fake.send(Welcome())
        await (await opening).__aexit__(None, None, None)


async def test_beats_are_sent_at_the_interval_that_the_broker_sets() -> None:
    with FakeBroker() as fake:
        async with linked(fake, beat_ms=20):
            for _ in range(5):
                assert (await fake.receive(Beat))[0].epoch == fake.epoch


async def test_an_unknown_connection_announces_itself_and_repeats_its_requests() -> None:
    with FakeBroker() as fake:
        async with linked(fake) as client:
            task = asyncio.create_task(client.request("echo", {"n": 1}))
            first, asked = await fake.receive(Request)
            assert (first.attempt, asked.body) == (0, {"n": 1})
            for _ in range(3):  # one for each message that came from an unknown connection
                fake.send(Gone("say HELLO first"))
            fake.hold_up()
            fake.epoch += 1
            await fake.receive(Hello)
            late = asyncio.create_task(client.request("echo", {"n": 2}))  # asked while the broker does not know us
            await asyncio.sleep(0.05)
            assert not [message for _, message in fake.arrived() if isinstance(message, Request)]
            fake.send(Welcome(beat_ms=60_000))
            repeated, new = [await fake.receive(Request) for _ in range(2)]
            assert (repeated[0].id, repeated[0].attempt, repeated[0].epoch) == (first.id, 1, fake.epoch)
            assert (new[0].attempt, new[0].epoch, new[1].body) == (0, fake.epoch, {"n": 2})
            fake.send(Final({"old": 1}), id=first.id, attempt=0)  # of the attempt that is over
            fake.send(Final({"old": 2}), id=first.id, attempt=1, epoch=fake.epoch - 1)  # of the broker that is gone
            fake.send(Final({"n": 1}), id=first.id, attempt=1)
            fake.send(Final({"n": 2}), id=new[0].id, attempt=0)
            assert (await task).body == {"n": 1} and (await late).body == {"n": 2}


async def test_what_waits_for_a_broker_that_forgot_us_is_dropped() -> None:
    count, filler = 3000, {"filler": bytes(10_000)}
    with FakeBroker() as fake:
        async with linked(fake) as client:
            tasks = [asyncio.create_task(client.request("echo", filler)) for _ in range(count)]
            await asyncio.sleep(0.1)  # the fake reads nothing: the socket is full
            fake.send(Gone())
            fake.hold_up()
            await asyncio.sleep(0.1)
            old = new = 0
            while new < count:
                for prefix, message in fake.taken():
                    if isinstance(message, Hello):
                        fake.epoch = 6
                        fake.send(Welcome(beat_ms=60_000))
                    elif isinstance(message, Request) and prefix.epoch == 6:
                        assert prefix.attempt == 1
                        new += 1
                        fake.send(Final(), id=prefix.id, attempt=1)
                    else:
                        assert isinstance(message, Request)
                        old += 1
                await asyncio.sleep(0.01)
            await asyncio.gather(*tasks)
            assert new == count and 0 < old < count


async def test_a_repeated_stream_goes_on_where_it_was() -> None:
    with FakeBroker() as fake:
        async with linked(fake) as client:
            stream = client.stream("count", window=4)
            prefix, asked = await fake.receive(Request)
            assert asked.window == 4
            for number in range(3):
                fake.send(Partial({"n": number}), id=prefix.id, sequence=number)
            assert [(await anext(stream)).body["n"] for _ in range(3)] == [0, 1, 2]
            assert (await fake.receive(Credit))[1].until == 6
            fake.send(Gone())
            await fake.receive(Hello)
            fake.send(Welcome(beat_ms=60_000))
            assert (await fake.receive(Request))[0].attempt == 1
            again, credit = await fake.receive(Credit)
            assert (again.attempt, credit.until) == (1, 6)  # else it would stop at a window that has been read
            for number in range(5):
                fake.send(Partial({"n": number}), id=prefix.id, attempt=1, sequence=number)
            for number in range(6):  # the broker gave it to another worker, which began anew
                fake.send(Partial({"n": number}), id=prefix.id, attempt=1, sequence=number)
            fake.send(Final(), id=prefix.id, attempt=1)
            assert [part.body["n"] async for part in stream] == [3, 4, 5]


async def test_an_answer_that_cannot_be_read_ends_its_request() -> None:
    with FakeBroker() as fake:
        async with linked(fake) as client:
            task = asyncio.create_task(client.request("echo"))
            prefix, _ = await fake.receive(Request)
            head = encode(Final({"x": 1}), id=prefix.id, epoch=fake.epoch)[0]
            fake.send_frames([b"\x00"])  # names no request
            fake.send_frames([head[:-1]])
            with pytest.raises(errors.WorkerFailed, match="cannot be read"):
                await task
            await fake.receive(Cancel)
            fake.send_frames([head])  # late: nobody waits for it
            fake.send(Final(), id=bytes(16))
            task = asyncio.create_task(client.request("echo"))
            prefix, _ = await fake.receive(Request)
            fake.send(Final({"fine": True}), id=prefix.id)
            assert (await task).body == {"fine": True}


async def test_a_request_that_cannot_be_read_is_answered() -> None:
    with FakeBroker() as fake:
        host = Host(Gate(), fake.url)
        opening = asyncio.create_task(host.open())
        await fake.welcome(beat_ms=60_000)
        await opening
        frames = encode(Request("gate", body={"x": "y"}), id=b"r" * 16, attempt=3, epoch=fake.epoch)
        fake.send_frames([frames[0][:-1], *frames[1:]])
        prefix, error = await fake.receive(Error)  # else the credit would never come back
        assert (prefix.id, prefix.attempt, error.code) == (b"r" * 16, 3, "malformed")
        await host.close()


async def test_what_the_broker_does_not_accept_ends_open() -> None:
    with FakeBroker() as fake:
        host = Host(Gate(), fake.url)
        opening = asyncio.create_task(host.open())
        await fake.receive(Hello)
        fake.send(Error("malformed", "a worker needs a capacity of at least 1"))
        with pytest.raises(errors.Malformed, match="capacity"):
            await opening
        opening = asyncio.create_task(ralmq.connect(fake.url).__aenter__())
        await fake.receive(Hello)
        fake.send_frames([PREFIX.pack(VERSION + 1, 2, 0, 0, 0, 5, bytes(16), 0) + bytes(4)])
        with pytest.raises(errors.Malformed, match="protocol version"):
            await opening


async def test_a_broker_that_falls_silent_is_away() -> None:
    with FakeBroker() as fake:
        async with linked(fake) as client:
            task = asyncio.create_task(client.request("echo", deadline=0.2))
            prefix, _ = await fake.receive(Request)
            assert 0 < prefix.deadline <= 200
            with pytest.raises(errors.DeadlineExceeded, match="no answer in time"):
                await task
            await fake.receive(Cancel)
            fake.send(Gone())
            await fake.receive(Hello)
            with pytest.raises(errors.DeadlineExceeded, match="is away"):
                await client.request("echo", deadline=0.1)


async def test_a_worker_that_drains_does_not_announce_itself_again() -> None:
    with FakeBroker() as fake:
        gate = Gate()
        host = Host(gate, fake.url)
        opening = asyncio.create_task(host.open())
        await fake.welcome(beat_ms=20)
        await opening
        fake.send(Request("gate"), id=b"r" * 16)
        await until(lambda: gate.begun == 1)
        draining = asyncio.create_task(host.drain(within=3600))
        await fake.receive(Bye)
        for _ in range(3):
            _, beat = await fake.receive(Beat)  # it still works, and says so
            assert beat.busy == 1 and beat.active == ((b"r" * 16, 0),)
        fake.send(Gone())  # but nobody waits for it any more
        async with asyncio.timeout(PATIENCE):
            await draining
        assert gate.cancelled == 1
        fake.hold_up()
        assert not [message for _, message in fake.arrived() if isinstance(message, Hello)]


async def test_progress_is_told_while_a_stream_waits_for_credit() -> None:
    with FakeBroker() as fake:
        count = Count()
        host = Host(count, fake.url)
        opening = asyncio.create_task(host.open())
        hello = await fake.welcome(beat_ms=20)
        assert hello.services == ("count",) and hello.idempotent and hello.name.startswith("count-")
        await opening
        fake.send(Request("count", window=2, body={"to": 5}), id=b"r" * 16)
        for number in range(2):
            prefix, part = await fake.receive(Partial)
            assert (prefix.sequence, part.body) == (number, {"n": number})
        beats = [(await fake.receive(Beat))[1] for _ in range(3)]
        assert beats[0].progress < beats[1].progress < beats[2].progress and beats[2].busy == 1
        fake.send(Credit(1), id=b"r" * 16)  # less than before: passed over
        fake.send(Credit(4), id=b"r" * 16)
        for number in (2, 3):
            assert (await fake.receive(Partial))[0].sequence == number
        fake.send(Credit(100), id=b"r" * 16)
        assert (await fake.receive(Partial))[0].sequence == 4
        assert (await fake.receive(Final))[1].body == {"last": 5}
        await host.close()
