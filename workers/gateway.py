"""The built-in worker `ralm-gateway`: an index for clients of the published RALM system, in its TCP format.

Knows bytes on two ports and the client's search. Integers of a head are u32 big-endian, arrays little-endian:

    request             k, then float32 [B, d]
    request with lists  B, d, nprobe, k, then float32 [B, d], then list ids int64 [B, nprobe]
    answer              ids int64 [B, k], then distances float32 [B, k]

On the coordinator port a client first sends 1 and waits for the same back; on the server port it does not.
"""

import asyncio
import contextlib
import logging
import struct
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np

from ..client.client import Client
from ..client.results import Reply
from ..schema.errors import RalmqError, Refused, WorkerFailed
from ..schema.message import Beat
from .base import Answer, Request, Worker
from .index.quantizer import METRICS, Quantizer

log = logging.getLogger("ralmq.gateway")
HELLO: Final = struct.pack(">I", 1)
STALL: Final = 60.0  # seconds that a client may take in the middle of a request, or of reading its answer
RECENT: Final = 1.0  # seconds for which the version of an index is taken to be what it was
WAIT: Final = 10.0  # seconds that a request waits for an index whose server is away
MAX_K: Final = 1024
MAX_PROBES: Final = 65_536
MAX_NUMBERS: Final = 1 << 24  # float32 of one request, and list ids: 64 MiB and 128 MiB

Array = np.ndarray[Any, Any]


class _Foreign(Exception):
    """Bytes that are no request of this format; after them nothing of the connection can be read."""


@dataclass(frozen=True, slots=True)
class Format:
    """What a client sends: `batch` queries of `d` numbers; `k` neighbours of each, 0 for whatever it says."""

    batch: int
    d: int
    k: int
    lists: bool

    @property
    def head(self) -> int:
        """Bytes before the arrays."""
        return 16 if self.lists else 4

    def sizes(self, head: bytes) -> tuple[int, int]:
        """(nprobe, k) of a request, nprobe 0 without lists.

        Raises:
            _Foreign: the head is none, or of another batch, dimension or k.
        """
        *given, nprobe, k = struct.unpack(">4I", head) if self.lists else (0, *struct.unpack(">I", head))
        if self.lists and given != [self.batch, self.d]:
            raise _Foreign(f"a batch of {given[0]} x {given[1]} came, {self.batch} x {self.d} is served")
        if self.lists and not 1 <= nprobe <= min(MAX_PROBES, MAX_NUMBERS // self.batch):
            raise _Foreign(f"nprobe is {nprobe}")
        if not 1 <= k <= MAX_K or (self.k and k != self.k):
            raise _Foreign(f"k is {k}, {self.k or f'1 to {MAX_K}'} is served")
        return nprobe, k


class Coarse:
    """The coarse quantizer of an index, fetched from it: tells how far from each query the lists lie that a client
    chose, since these distances do not travel in this format and some indexes compute with them."""

    def __init__(self, index: str) -> None:
        self._service = f"search:{index}"
        self._version: Any = None
        self._quantizer: Quantizer | None = None
        self._shape = (0, 0)
        self._asked = -RECENT
        self._asking = asyncio.Lock()

    async def distances(self, client: Client, queries: Array, lists: Array) -> Array:
        """float32 of the shape of `lists`.

        Raises:
            Refused: a list that the index does not have, or another dimension.
            RalmqError: as the index answers.
        """
        async with self._asking:
            await self._refresh(client)
        assert self._quantizer is not None
        count, d = self._shape
        if lists.min() < 0 or lists.max() >= count:
            raise Refused(f"list ids leave the index: it has {count} lists")
        if d != queries.shape[1]:
            raise Refused(f"queries have {queries.shape[1]} dimensions, the index {d}")
        return self._quantizer.distances(queries, lists)

    async def _refresh(self, client: Client) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._asked < RECENT:
            return
        version = (await _asked(client, self._service, {"info": True})).body.get("version")
        if version != self._version or self._quantizer is None:
            reply = await _asked(client, self._service, {"quantizer": True})
            centroids: Array = reply.tensors[0].numpy() if reply.tensors else np.empty(0)
            metric = reply.body.get("metric")
            if centroids.ndim != 2 or centroids.dtype != np.float32 or metric not in METRICS:
                raise WorkerFailed(f"{self._service} answered without centroids: is another program serving its name?")
            self._quantizer, self._shape = Quantizer(centroids, metric), (len(centroids), centroids.shape[1])
            self._version = version
        self._asked = now


class RalmGateway(Worker):
    """Serves the index to RALM's clients; its own service `ralm-gateway:<index>` says how it goes.

    A client's requests are answered in their order. What a client gets wrong, or an index that fails, closes that
    client's connection with a line in the log, since the format has no word for it.

    Args:
        index: name of a served index.
        server_port: where clients send requests at once; 0 for a free one.
        coordinator_port: where they first say hello; 0 for a free one.
        batch, d: queries of each request, and their dimension.
        k: neighbours that each request asks for; 0 for whatever it says.
        nprobe: lists to look at for requests without lists; 0 for the index's own number.
        lists: whether requests name their lists.
        host: address to listen at.
        clients: connections at a time; further ones are closed.
        insecure: listen at an address that others can reach: whoever reaches it may search.
    """

    idempotent = True

    def __init__(
        self,
        *,
        index: str,
        server_port: int,
        coordinator_port: int,
        batch: int = 32,
        d: int = 512,
        k: int = 0,
        nprobe: int = 0,
        lists: bool = False,
        host: str = "127.0.0.1",
        clients: int = 1024,
        insecure: bool = False,
    ) -> None:
        lowest = {"batch": (batch, 1), "d": (d, 1), "k": (k, 0), "nprobe": (nprobe, 0), "clients": (clients, 1)}
        for option, (value, least) in lowest.items():
            if value < least:
                raise Refused(f"-o {option}={value} is too small: give at least {least}")
        if batch * d > MAX_NUMBERS or k > MAX_K:
            raise Refused(f"-o batch={batch} d={d} k={k}: give batch x d of at most {MAX_NUMBERS} and k of {MAX_K}")
        for option, port in (("server_port", server_port), ("coordinator_port", coordinator_port)):
            if not 0 <= port < 65_536:
                raise Refused(f"-o {option}={port} is no port: give 0 to 65535")
        if host not in ("127.0.0.1", "::1", "localhost") and not insecure:
            raise Refused(f"-o host={host} is open to other machines: give a loopback address, or -o insecure=true")
        self.service = f"ralm-gateway:{index}"
        self.ports: tuple[int, int] = (server_port, coordinator_port)
        self._index = index
        self._format = Format(batch, d, k, lists)
        self._nprobe = nprobe or None
        self._host = host
        self._most = clients
        self._coarse = Coarse(index)
        self._connections: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._counts = {"clients": 0, "answered": 0, "refused": 0, "failed": 0}

    async def start(self) -> None:
        """Takes both ports; clients are let in once the broker is there.

        Raises:
            Refused: a port is taken, or the address is none of this machine.
        """
        ports = []
        for port, hello in zip(self.ports, (False, True), strict=True):
            try:
                accept = partial(self._accepted, hello)
                server = await asyncio.start_server(accept, self._host, port, start_serving=False)
            except OSError as error:
                await self.stop()
                raise Refused(f"{self._host}:{port} cannot be bound ({error.strerror}): give another port") from None
            self._servers.append(server)
            ports.append(server.sockets[0].getsockname()[1])
        self.ports = (ports[0], ports[1])
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def stop(self) -> None:
        tasks = [*self._connections]
        if self._servers and hasattr(self, "_opening"):
            tasks.append(self._opening)
        for task in tasks:
            task.cancel()
        for server in self._servers:
            server.close()
        if tasks:
            await asyncio.wait(tasks)

    async def handle(self, request: Request) -> Answer:
        """Ports and counts."""
        server, coordinator = self.ports
        return {"host": self._host, "server_port": server, "coordinator_port": coordinator, **self._counts}

    def beat(self, beat: Beat) -> Beat:
        return replace(beat, gauges=dict(self._counts))

    # -- inside

    async def _open(self) -> None:
        while not hasattr(self.host, "client"):  # made once `start` is done
            await asyncio.sleep(0.01)
        for server in self._servers:
            await server.start_serving()
        log.info(
            "clients of search:%s at %s, ports %d (server) and %d (coordinator)", self._index, self._host, *self.ports
        )

    async def _accepted(self, hello: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        who = writer.get_extra_info("peername")
        try:
            if len(self._connections) >= self._most:
                raise _Foreign(f"{self._most} clients are connected")
            self._connections.add(task)
            self._counts["clients"] = len(self._connections)
            await self._serve(hello, reader, writer)
        except _Foreign as fault:
            self._counts["refused"] += 1
            log.warning("%s is cut off: %s", who, fault)
        except RalmqError as fault:
            self._counts["failed"] += 1
            log.warning("%s is cut off: search:%s: %s", who, self._index, fault.message)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            log.info("%s has left", who)
        except Exception:
            self._counts["failed"] += 1
            log.exception("%s is cut off", who)
        finally:
            self._connections.discard(task)
            self._counts["clients"] = len(self._connections)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, hello: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: a request is read once the answer to the one before is out."""
        if hello:
            if await reader.readexactly(len(HELLO)) != HELLO:
                raise _Foreign("it did not begin with 1")
            writer.write(HELLO)
        shape = self._format
        while True:
            first = await reader.readexactly(1)  # between two requests a client may take its time
            async with asyncio.timeout(STALL):
                nprobe, k = shape.sizes(first + await reader.readexactly(shape.head - 1))
                queries = np.frombuffer(await reader.readexactly(4 * shape.batch * shape.d), "<f4")
                lists = np.frombuffer(await reader.readexactly(8 * shape.batch * nprobe), "<i8")
            answer = await self._answer(queries.reshape(shape.batch, shape.d), lists.reshape(shape.batch, nprobe), k)
            writer.write(answer)
            async with asyncio.timeout(STALL):
                await writer.drain()
            self._counts["answered"] += 1

    async def _answer(self, queries: Array, lists: Array, k: int) -> bytes:
        client = self.host.client
        chosen = (lists, await self._coarse.distances(client, queries, lists)) if lists.size else None
        hits = await client.search(
            self._index,
            queries,
            k=k,
            nprobe=None if chosen else self._nprobe,
            lists=chosen,
            payloads=False,
            wait_service=WAIT,
            retries=3,
        )
        if hits.ids.shape != (len(queries), k) or hits.distances.shape != (len(queries), k):
            raise WorkerFailed(f"search:{self._index} answered in another shape: is another program serving its name?")
        return hits.ids.astype("<i8").tobytes() + hits.distances.astype("<f4").tobytes()


async def _asked(client: Client, service: str, body: dict[str, Any]) -> Reply:
    return await client.request(service, body, wait_service=WAIT, retries=3)
