"""Unmodified RALM clients over TCP: both requests on both ports, many at once, and those that send nonsense."""

import asyncio
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gateway.ralm import NLIST, NPROBE, B, Caller, D, K, Shelf, answer, inverted, queries, request, request_with_lists
from inprocess import Cluster, cluster
from ralmq.errors import Refused
from ralmq.workers import gateway as module
from ralmq.workers.base import Worker
from ralmq.workers.gateway import RalmGateway
from ralmq.workers.options import build
from ralmq.workers.registry import find
from serving import until


def gateway(*pairs: str, index: str = "shelf") -> RalmGateway:
    given = [f"index={index}", "server_port=0", "coordinator_port=0", f"nprobe={NPROBE}", *pairs]
    worker = build(find("ralm-gateway"), given)
    assert isinstance(worker, RalmGateway)
    return worker


def served(body: Callable[[Cluster], Any], *workers: Worker) -> None:
    async def main() -> None:
        async with cluster(*workers, inproc=True) as running:
            gates = [worker for worker in workers if isinstance(worker, RalmGateway)]
            await until(lambda: all(server.is_serving() for gate in gates for server in gate._servers))
            await body(running)

    asyncio.run(main())


@pytest.mark.parametrize("coordinator", [False, True])
@pytest.mark.parametrize("lists", [False, True])
def test_a_recorded_stream_is_answered_byte_for_byte(coordinator: bool, lists: bool) -> None:
    index = inverted()
    gate, shelf = gateway(f"lists={lists}"), Shelf(index)
    asked = queries(1)
    distances, ids = index.search(asked, K)
    raw = request_with_lists(asked, index.quantizer.search(asked, NPROBE)[1]) if lists else request(asked)
    wanted = ids.astype("<i8").tobytes() + distances.astype("<f4").tobytes()
    assert (len(raw), len(wanted)) == (73_744 if lists else 65_540, 3_840)

    async def body(_: Cluster) -> None:
        async with Caller(gate.ports[coordinator], coordinator=coordinator) as caller:
            for _repeat in range(3):
                caller.writer.write(raw)
                assert await caller.reader.readexactly(len(wanted)) == wanted
        assert [found.get("nprobe") for found in shelf.bodies] == [None if lists else NPROBE] * 3
        assert shelf.quantizers == (1 if lists else 0)

    served(body, gate, shelf)


@pytest.mark.parametrize(("factory", "metric"), [(f"IVF{NLIST},PQ16x4", "l2"), (f"IVF{NLIST},Flat", "ip")])
def test_distances_to_the_lists_are_the_indexs_own(factory: str, metric: str) -> None:
    """PQ of residuals computes with them: a wrong one is a wrong answer."""
    index = inverted(factory)
    gate, shelf = gateway("lists=true", f"k={K}"), Shelf(index)
    asked = queries(2)
    distances, ids = index.search(asked, K)

    async def body(_: Cluster) -> None:
        async with Caller(gate.ports[0], coordinator=False) as caller:
            found = await caller.ask(request_with_lists(asked, index.quantizer.search(asked, NPROBE)[1]))
        assert found[0].tolist() == ids.tolist() and found[1].tolist() == distances.tolist()

    served(body, gate, shelf)


def test_requests_in_pieces_and_many_in_one_piece() -> None:
    index = inverted()
    gate = gateway()
    batches = [queries(seed) for seed in range(6)]
    wanted = [index.search(asked, K)[1].tolist() for asked in batches]
    raw = b"".join(map(request, batches))

    async def body(_: Cluster) -> None:
        async with Caller(gate.ports[1], coordinator=True) as caller:
            caller.writer.write(raw)
            found = await caller.reader.readexactly(6 * 3_840)
            assert [answer(found[at : at + 3_840])[0].tolist() for at in range(0, len(found), 3_840)] == wanted
            for at in range(0, len(raw), 10_007):
                caller.writer.write(raw[at : at + 10_007])
                await caller.writer.drain()
                await asyncio.sleep(0)
            for ids in wanted:
                assert answer(await caller.reader.readexactly(3_840))[0].tolist() == ids

    served(body, gate, Shelf(index))


@pytest.mark.parametrize("lists", [False, True])
def test_eight_clients_whose_answers_come_at_once_get_each_its_own(lists: bool) -> None:
    """The index holds all answers back until eight requests are in, and then gives the last one's first."""
    index = inverted()
    gate, shelf = gateway(f"lists={lists}"), Shelf(index, together=8)
    crossed: list[tuple[int, int]] = []

    async def client(number: int) -> None:
        async with Caller(gate.ports[number % 2], coordinator=bool(number % 2)) as caller:
            for turn in range(12):
                asked = queries(100 * number + turn)
                chosen = index.quantizer.search(asked, NPROBE)[1]
                ids, _ = await caller.ask(request_with_lists(asked, chosen) if lists else request(asked))
                if ids.tolist() != index.search(asked, K)[1].tolist():
                    crossed.append((number, turn))

    async def body(running: Cluster) -> None:
        await asyncio.gather(*map(client, range(8)))
        assert crossed == [] and len(shelf.bodies) == 96
        reply = await (await running.client()).request("ralm-gateway:shelf")
        assert reply.body["answered"] == 96 and reply.body["server_port"] == gate.ports[0]

    served(body, gate, shelf)


def bad_streams(index: Any) -> list[bytes]:
    """What ends a connection without an answer, each for another reason."""
    good, chosen = queries(3), index.quantizer.search(queries(3), NPROBE)[1]
    missing = chosen.copy()
    missing[7, 3] = NLIST
    negative = np.where(chosen == chosen[0, 0], -1, chosen)
    blank = good.copy()
    blank[5, 5] = np.nan
    return [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 40_000,
        struct.pack(">IIII", B - 1, D, NPROBE, K),
        struct.pack(">IIII", B, D + 1, NPROBE, K),
        struct.pack(">IIII", B, D, 0, K),
        struct.pack(">IIII", B, D, 1 << 31, K),
        struct.pack(">IIII", B, D, NPROBE, 0),
        struct.pack(">IIII", B, D, NPROBE, K + 1),
        struct.pack("<IIII", B, D, NPROBE, K),
        request_with_lists(good, missing),
        request_with_lists(good, negative),
        request_with_lists(blank, chosen),
    ]


def test_a_request_has_so_many_lists_as_fit_in_memory() -> None:
    shape = module.Format(batch=4096, d=4, k=0, lists=True)
    most = module.MAX_NUMBERS // 4096
    assert shape.sizes(struct.pack(">4I", 4096, 4, most, 10)) == (most, 10)
    with pytest.raises(module._Foreign, match="nprobe is"):
        shape.sizes(struct.pack(">4I", 4096, 4, most + 1, 10))


def test_nonsense_ends_its_own_connection_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    index = inverted()

    class Strict(Shelf):
        async def handle(self, request: Any) -> Any:
            if request.tensors and not np.isfinite(request.tensors[0].numpy()).all():
                raise Refused("queries hold NaN")
            return await super().handle(request)

    gate = gateway("lists=true", f"k={K}")
    asked = queries(9)
    wanted = index.search(asked, K)[1].tolist()
    raw = request_with_lists(asked, index.quantizer.search(asked, NPROBE)[1])

    async def body(_: Cluster) -> None:
        async with Caller(gate.ports[0], coordinator=False) as neighbour:
            for stream in bad_streams(index):
                async with Caller(gate.ports[0], coordinator=False) as caller:
                    caller.writer.write(stream)
                    assert await caller.reader.read() == b""
                assert (await neighbour.ask(raw))[0].tolist() == wanted
            for stream in (b"\0\0\0\2", b"\1\0\0\0", raw):
                reader, writer = await asyncio.open_connection("127.0.0.1", gate.ports[1])
                writer.write(stream)
                assert await reader.read() == b""
                writer.close()
            for length in (0, 1, 16, 5_000, len(raw) - 1, len(raw)):  # these leave
                _reader, writer = await asyncio.open_connection("127.0.0.1", gate.ports[0])
                writer.write(raw[:length])
                writer.close()
            assert (await neighbour.ask(raw))[0].tolist() == wanted
            await until(lambda: gate._counts["clients"] == 1)
            assert (gate._counts["refused"], gate._counts["failed"]) == (9 + 3, 3)
        assert caplog.text.count("is cut off") == 15

    served(body, gate, Strict(index))


def test_a_reader_that_stops_in_the_middle_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL", 0.05)
    gate = gateway()

    async def body(_: Cluster) -> None:
        async with (
            Caller(gate.ports[0], coordinator=False) as patient,
            Caller(gate.ports[0], coordinator=False) as half,
        ):
            half.writer.write(request(queries(1))[:999])
            assert await half.reader.read() == b""
            assert (await patient.ask(request(queries(1))))[0].shape == (B, K), "between requests it may take its time"

    served(body, gate, Shelf(inverted()))


def test_an_index_that_is_away_ends_the_connection_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.0)
    gate = gateway()

    async def body(running: Cluster) -> None:
        async with Caller(gate.ports[0], coordinator=False) as caller:
            caller.writer.write(request(queries(1)))
            assert await caller.reader.read() == b""
        assert gate._counts["failed"] == 1
        await running.worker(Shelf(inverted()))
        async with Caller(gate.ports[0], coordinator=False) as caller:
            await caller.ask(request(queries(1)))

    async def main() -> None:
        async with cluster(gate, inproc=True) as running:
            await until(lambda: all(server.is_serving() for server in gate._servers))
            await asyncio.sleep(3 * 0.1)  # within three intervals of its start a broker waits for every service
            await body(running)

    asyncio.run(main())


def test_more_clients_than_may_be(caplog: pytest.LogCaptureFixture) -> None:
    gate = gateway("clients=2")

    async def body(_: Cluster) -> None:
        async with (
            Caller(gate.ports[0], coordinator=False) as first,
            Caller(gate.ports[0], coordinator=False),
        ):
            await until(lambda: gate._counts["clients"] == 2)
            async with Caller(gate.ports[0], coordinator=False) as third:
                assert await third.reader.read() == b""
            await first.ask(request(queries(1)))
        assert "2 clients are connected" in caplog.text

    served(body, gate, Shelf(inverted()))


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("batch=0", "batch=0 is too small"),
        ("d=0", "d=0 is too small"),
        ("k=-1", "k=-1"),
        ("k=1025", "k of 1024"),
        ("batch=100000", "batch x d"),
        ("server_port=65536", "no port"),
        ("host=0.0.0.0", "open to other machines"),
        ("lists=perhaps", "lists=perhaps"),
    ],
)
def test_options_that_are_refused(pair: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        gateway(pair)


def test_a_port_that_is_taken() -> None:
    async def main() -> None:
        taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = taken.sockets[0].getsockname()[1]
        with pytest.raises(Refused, match=f"127.0.0.1:{port} cannot be bound"):
            await gateway(f"coordinator_port={port}").start()
        taken.close()

    asyncio.run(main())
