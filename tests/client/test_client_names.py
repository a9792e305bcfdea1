"""The broker's address has a host name: it is looked up anew, and a name server that is silent holds nothing up."""

import asyncio
import socket
import threading
from itertools import pairwise
from typing import Any

import pytest
import ralmq
from inprocess import PACE, cluster
from ralmq.broker.server import Server
from ralmq.client import names
from ralmq.workers.echo import Echo
from ralmq.workers.host import Host
from relay import Relay
from serving import free_url, until

NAME = "broker.test"


class NameServer:
    """Answers for NAME alone: with `addresses`, not at all while `silent`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[str] = []
        self.silent = False
        self.asked = 0
        self._release = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(names.socket, "getaddrinfo", self._answer)

    def end(self) -> None:
        self._release.set()

    def _answer(self, host: str, *arguments: Any, **options: Any) -> Any:
        if host != NAME:
            return self._real(host, *arguments, **options)
        self.asked += 1
        if self.silent:
            self._release.wait()
        if not self.addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.addresses]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = NameServer(monkeypatch)
    yield server
    server.end()


def named(url: str) -> str:
    return f"tcp://{NAME}:{url.rpartition(':')[2]}"


async def test_a_name_that_is_not_known_yet_is_asked_for_again(name_server: NameServer) -> None:
    async with cluster(Echo()) as here:
        opening = asyncio.create_task(here.client(named(here.url)))
        await until(lambda: name_server.asked == 2)
        name_server.addresses = ["127.0.0.1"]
        client = await opening
        assert (await client.request("echo", {"n": 1})).body == {"n": 1}


async def test_a_silent_name_server_holds_up_neither_others_nor_the_way_back(name_server: NameServer) -> None:
    async with cluster(Echo()) as here, Relay(here.url) as relay:
        name_server.addresses = ["127.0.0.1"]
        client = await here.client(named(relay.url))
        name_server.silent = True
        for turn in range(1, 4):
            relay.cut()
            await until(lambda: name_server.asked > turn and relay.connections > turn)  # noqa: B023
            assert (await client.request("echo", {"n": turn})).body == {"n": turn}
        assert (await (await here.client()).request("echo", {"n": 9})).body == {"n": 9}


async def test_an_old_question_without_an_answer_does_not_hold_up_the_next(name_server: NameServer) -> None:
    async with cluster(Echo()) as here:
        name_server.silent = True
        opening = asyncio.create_task(here.client(named(here.url)))
        await until(lambda: name_server.asked == 1)
        name_server.silent, name_server.addresses = False, ["127.0.0.1"]
        client = await opening
        assert (await client.request("echo", {"n": 1})).body == {"n": 1}


async def test_a_broker_that_comes_back_at_another_address_is_found(name_server: NameServer) -> None:
    port = free_url().rpartition(":")[2]
    name_server.addresses = ["127.0.0.1"]
    async with Server(f"tcp://127.0.0.1:{port}", limits=PACE) as first:
        host = Host(Echo(), f"tcp://{NAME}:{port}")
        await host.open()
    async with Server(f"tcp://127.0.0.2:{port}", limits=PACE) as second:
        name_server.addresses = ["127.0.0.2"]
        await until(lambda: len(second.core.roster.peers) == 1)
        assert first.core.epoch != second.core.epoch
        await host.drain()


async def test_of_several_addresses_one_that_answers_is_found(name_server: NameServer) -> None:
    port = free_url().rpartition(":")[2]
    name_server.addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    async with Server(f"tcp://127.0.0.3:{port}", limits=PACE) as server:
        async with ralmq.connect(f"tcp://{NAME}:{port}", wait=30):
            assert len(server.core.roster.peers) == 1
        assert name_server.asked == 1 + 2 * names.EACH


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "AGAIN", 0.01)


async def test_each_of_several_addresses_has_its_time(name_server: NameServer, hurried: None) -> None:
    """One that is listed twice hides no other; one that is listed no more is left at once."""
    name_server.addresses = ["127.0.0.1", "127.0.0.1", "127.0.0.2"]
    tried: list[tuple[str, int]] = []
    known = names.Names(f"tcp://{NAME}:1", lambda url: tried.append((url[6:-2], name_server.asked)))
    known.start()
    await until(lambda: len(tried) == 4)
    assert [address for address, _ in tried] == ["127.0.0.1", "127.0.0.2"] * 2
    questions = [asked for _, asked in tried]
    assert all(after - before >= names.EACH for before, after in pairwise(questions[1:]))
    name_server.addresses = ["127.0.0.3"]
    await until(lambda: tried[-1][0] == "127.0.0.3")
    known.stop()
    tried.clear()
    name_server.addresses = ["127.0.0.3", "127.0.0.4"]
    before = name_server.asked
    known.start()  # the connection was cut: the broker is most likely where it was
    await until(lambda: tried)
    assert tried[0][0] == "127.0.0.4" and tried[0][1] - before >= names.EACH
    known.stop()


async def test_a_name_that_nobody_knows_is_named(
    name_server: NameServer, hurried: None, caplog: pytest.LogCaptureFixture
) -> None:
    """To those who wait for a while, with the error; to those who wait for ever once, in the log."""
    with pytest.raises(ralmq.errors.NoBroker, match=r"host name is not known \(Temporary failure in name resolution\)"):
        await ralmq.connect(f"tcp://{NAME}:5555", wait=0.2).__aenter__()
    assert "goes on trying" not in caplog.text
    async with cluster(Echo()) as here:
        opening = asyncio.create_task(Host(Echo(), named(here.url)).open(float("inf")))
        begun = name_server.asked
        await until(lambda: name_server.asked >= begun + 5)
        name_server.addresses = ["127.0.0.1"]
        await opening
    assert caplog.text.count(f"the host name of tcp://{NAME}:") == 1


async def test_a_name_that_is_known_is_not_blamed(name_server: NameServer, hurried: None) -> None:
    opening = asyncio.create_task(ralmq.connect(f"tcp://{NAME}:{free_url().rpartition(':')[2]}", wait=0.5).__aenter__())
    await until(lambda: name_server.asked >= 2)
    name_server.addresses = ["127.0.0.1"]
    with pytest.raises(ralmq.errors.NoBroker, match="start one"):
        await opening


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1", "0x7f000001", "[::1]", "*", "a;b"])
async def test_what_is_no_name_is_left_to_libzmq(host: str) -> None:
    assert not names.Names(f"tcp://{host}:5555", print).needed
