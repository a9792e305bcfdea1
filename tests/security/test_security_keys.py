"""Wrong, missing and revoked keys, with real sockets: nothing is delivered, and it is counted. Roles and owners."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from commands import ralmq
from inprocess import PACE
from ralmq.broker.server import Server
from ralmq.client.client import connect
from ralmq.errors import NoBroker, Refused
from ralmq.schema.codec import encode
from ralmq.schema.message import Hello, Request
from ralmq.workers.echo import Echo
from ralmq.workers.host import Host
from relay import Relay
from serving import free_url, until


@asynccontextmanager
async def guarded(keys: Path) -> AsyncIterator[Server]:
    async with Server("tcp://127.0.0.1:*", limits=PACE, keys=keys) as server:
        yield server


@asynccontextmanager
async def serving(server: Server, key: Path | str) -> AsyncIterator[Host]:
    host = Host(Echo(), server.endpoint, keys=key)
    await host.open()
    try:
        yield host
    finally:
        await host.close()


def counts(server: Server) -> dict[str, int]:
    return server.core.requests.counts


def nobody(server: Server) -> bool:
    """Whether the core knows of no peer and has seen no message."""
    return not server.core.roster.peers and not server.core.requests.counts["malformed"]


async def test_who_has_a_key_is_served(keys: Path) -> None:
    async with (
        guarded(keys) as server,
        serving(server, keys / "worker.key"),
        connect(server.endpoint, keys=keys / "client.key") as client,
    ):
        assert (await client.request("echo", {"text": "hi"})).body == {"text": "hi"}
        assert [worker["key"] for worker in (await client.status())["workers"]] == ["worker"]


async def test_the_folder_has_a_key_for_each_part(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RALMQ_KEYS", str(keys))
    async with guarded(keys) as server:
        host = Host(Echo(), server.endpoint)
        await host.open()
        async with connect(server.endpoint) as client:
            assert (await client.request("echo", {"n": 1})).body == {"n": 1}
        assert {entry.name for entry in server.core.roster.entries.values()} == {"worker", "admin"}
        await host.close()


async def test_no_key_gets_nothing_through(keys: Path) -> None:
    async with guarded(keys) as server:
        with pytest.raises(Refused, match="lets nobody in without a key"):
            async with connect(server.endpoint, keys=""):
                pass
        assert nobody(server)
        assert counts(server)["no_handshake"] >= 1


async def test_a_key_that_is_not_in_the_list_gets_nothing_through(keys: Path, tmp_path: Path) -> None:
    assert ralmq("keys", "init", "others", home=tmp_path).returncode == 0
    forged = json.loads((tmp_path / "others" / "client.key").read_text())
    forged["broker"] = json.loads((keys / "client.key").read_text())["broker"]
    (tmp_path / "others" / "client.key").write_text(json.dumps(forged))
    async with guarded(keys) as server:
        with pytest.raises(Refused, match="does not let this key in"):
            async with connect(server.endpoint, keys=tmp_path / "others" / "client.key"):
                pass
        assert nobody(server)
        assert counts(server)["unknown_key"] == 1


async def test_a_broker_that_is_another_one_gets_nothing_from_its_clients(keys: Path, tmp_path: Path) -> None:
    assert ralmq("keys", "init", "others", home=tmp_path).returncode == 0
    async with guarded(tmp_path / "others") as server:
        with pytest.raises(Refused, match="has another key than the file says"):
            async with connect(server.endpoint, keys=keys / "client.key"):
                pass
        assert nobody(server)
        assert counts(server)["no_handshake"] >= 1


async def test_a_client_with_a_key_tells_a_broker_without_one_nothing(keys: Path) -> None:
    async with Server("tcp://127.0.0.1:*", limits=PACE) as server:
        with pytest.raises(Refused, match="takes no keys"):
            async with connect(server.endpoint, keys=keys / "client.key"):
                pass
        assert nobody(server)


async def test_ipc_needs_no_key(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RALMQ_KEYS", str(keys))
    async with Server(f"ipc://{tmp_path}/broker", limits=PACE) as server, connect(server.endpoint) as client:
        assert (await client.status())["workers"] == []


async def test_without_its_authenticator_nobody_gets_in(keys: Path) -> None:
    async with guarded(keys) as server:
        guard = server._guard
        assert guard is not None
        guard.stop()
        with pytest.raises((NoBroker, Refused)):
            async with connect(server.endpoint, keys=keys / "client.key", wait=0.5):
                pass
        assert nobody(server)
        assert not counts(server)["unauthorized"], "nothing was even taken to be refused"


async def test_a_revoked_key_loses_its_connection_and_comes_in_no_more(keys: Path, tmp_path: Path) -> None:
    async with guarded(keys) as server, serving(server, keys / "worker.key") as host:
        assert host.link.epoch
        async with connect(server.endpoint, keys=keys / "client.key") as client:
            assert (await client.request("echo", {"n": 1})).body == {"n": 1}
            assert ralmq("keys", "revoke", "worker", "--keys", str(keys), home=tmp_path).returncode == 0
            await until(lambda: counts(server)["revoked"] == 1, "the revocation")
            await until(lambda: counts(server)["unknown_key"] >= 1, "the refusal of its return")
            assert (await client.status())["workers"] == []
            assert (await client.status())["broker"]["counts"]["revoked"] == 1
        assert not (keys / "worker.key").exists()


async def test_what_a_revoked_key_has_sent_before_is_not_taken(keys: Path) -> None:
    """The list changes while messages of the key lie in the broker's socket."""
    with zmq.Context() as context:
        async with guarded(keys) as server:
            guard = server._guard
            assert guard is not None
            with raw(context, server, keys / "client.key") as socket:
                socket.send_multipart(encode(Hello(bytes(15) + b"x", "x")))
                await until(lambda: len(server.core.roster.peers) == 1, "its HELLO")
                for n in range(10):
                    asked = encode(Request("ralmq.status"), id=bytes(15) + bytes([n]), epoch=server.core.epoch)
                    socket.send_multipart(asked)
                while not int(server._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                    time.sleep(0.01)  # the loop does not run
                assert socket.recv_multipart() and not socket.poll(0), "WELCOME alone"
                guard.allowed = {}
                server._revoke()
                await until(lambda: counts(server)["void"] >= 1, "the refusal")
                assert nobody(server)
                assert not socket.poll(300), "nothing was answered"


async def test_a_key_that_is_added_is_let_in_by_a_running_broker(keys: Path, tmp_path: Path) -> None:
    async with guarded(keys) as server:
        added = ralmq("keys", "add", "bob", "--role", "worker", "--offers", "ec*", "--keys", str(keys), home=tmp_path)
        assert added.returncode == 0
        await until(lambda: len(server._guard.allowed) == 4, "the new list")  # type: ignore[union-attr]
        async with serving(server, keys / "bob.key"):
            assert [peer.name[:4] for peer in server.core.roster.peers.values()] == ["echo"]


@pytest.mark.parametrize("name", ["client", "admin"])
async def test_only_a_worker_offers(keys: Path, name: str) -> None:
    async with guarded(keys) as server:
        with pytest.raises(Refused, match=rf"the key {name} \({name}\) may not offer echo"):
            async with serving(server, keys / f"{name}.key"):
                pass
        assert not server.core.requests.services
        assert counts(server)["forbidden"] >= 1


async def test_a_worker_offers_what_its_key_allows(keys: Path, tmp_path: Path) -> None:
    add = ralmq("keys", "add", "idx", "--role", "worker", "--offers", "search:*", "--keys", str(keys), home=tmp_path)
    assert add.returncode == 0
    async with guarded(keys) as server:
        with pytest.raises(Refused, match="may not offer echo"):
            async with serving(server, keys / "idx.key"):
                pass
        host = Host(Echo(name="search:docs"), server.endpoint, keys=keys / "idx.key")
        await host.open()
        await host.close()


async def test_what_the_broker_itself_does_is_for_admins(keys: Path) -> None:
    async with guarded(keys) as server:
        server.core.requests.builtins["ralmq.test"] = lambda now, asker, prefix, body: {"done": True}
        async with connect(server.endpoint, keys=keys / "client.key") as client:
            with pytest.raises(Refused, match=r"may not ask ralmq\.test"):
                await client.request("ralmq.test")
        async with connect(server.endpoint, keys=keys / "admin.key") as client:
            assert (await client.request("ralmq.test")).body == {"done": True}


def raw(context: zmq.Context[Any], server: Server, key: Path, identity: bytes = b"") -> zmq.Socket[bytes]:
    """A DEALER that obeys no rule of ours."""
    document = json.loads(key.read_text())
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if identity:
        socket.setsockopt(zmq.ROUTING_ID, identity)
    socket.curve_publickey = document["public"].encode()
    socket.curve_secretkey = document["secret"].encode()
    socket.curve_serverkey = document["broker"].encode()
    socket.connect(server.endpoint)
    return socket


async def test_a_routing_id_of_its_own_is_not_taken(keys: Path) -> None:
    with zmq.Context() as context:
        async with guarded(keys) as server:
            with raw(context, server, keys / "client.key", b"worker") as socket:
                socket.send_multipart(encode(Hello(bytes(16), "x")))
                await until(lambda: counts(server)["unauthorized"] >= 1, "the refusal")
                assert nobody(server)


async def test_ids_and_nonces_belong_to_their_owner(keys: Path, tmp_path: Path) -> None:
    """Another key can neither end, nor hold, nor use up what is asked under an id, nor replace a peer by its nonce."""
    async with (
        guarded(keys) as server,
        serving(server, keys / "worker.key"),
        connect(server.endpoint, keys=keys / "client.key") as client,
    ):
        await client.request("echo", {"n": 1})
        ended = next(iter(server.core.requests._ended[0]))
        nonce = client._link.hello.nonce
        with zmq.Context() as context, raw(context, server, keys / "admin.key") as other:
            before = counts(server)["malformed"]
            other.send_multipart(encode(Hello(nonce, "thief")))
            await until(lambda: counts(server)["malformed"] == before + 1, "the refusal of the nonce")
            other.send_multipart(encode(Hello(bytes(15) + b"x", "thief")))
            await until(lambda: len(server.core.roster.peers) == 3, "its HELLO")
            other.send_multipart(encode(Request("echo"), id=ended, attempt=9, epoch=server.core.epoch))
            await until(lambda: counts(server)["malformed"] == before + 2, "the refusal of the id")
        assert (await client.request("echo", {"n": 2})).body == {"n": 2}


@pytest.mark.parametrize("keyed", [True, False])
async def test_who_waits_for_a_broker_waits_also_behind_a_proxy_that_closes(keys: Path, keyed: bool) -> None:
    """Handshakes break off there until the broker is up, as they do at a broker that takes other keys."""
    url = free_url()
    async with Relay(url) as relay:
        host = Host(Echo(), relay.url, keys=keys / "worker.key" if keyed else "")
        opening = asyncio.create_task(host.open(wait=float("inf")))
        await until(lambda: relay.connections > 8 or opening.done(), "some attempts")
        assert not opening.done()
        async with Server(url, limits=PACE, keys=keys if keyed else None) as server:
            await opening
            assert [peer.name for peer in server.core.roster.peers.values()] == [host.link.hello.name]
            await host.close()
