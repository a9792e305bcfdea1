"""A broker, workers and clients within one process, for tests. Knows no test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import zmq
from ralmq.broker.limits import Limits
from ralmq.broker.server import Server
from ralmq.client.client import Client, connect
from ralmq.workers.base import Worker
from ralmq.workers.host import Host
from serving import until

PACE = Limits(beat=0.1)  # intervals short enough that no test waits long for a grace to end


class Cluster:
    """Opened by `cluster`; everything is closed at its end, in the order clients, workers, broker."""

    def __init__(self, url: str, limits: Limits, context: zmq.Context[Any] | None) -> None:
        self.url = url
        self.hosts: list[Host] = []
        self._limits = limits
        self._context = context
        self._clients = AsyncExitStack()

    async def start(self) -> Self:
        self.server = Server(self.url, limits=self._limits, context=self._context)
        await self.server.__aenter__()
        self.url = self.server.endpoint
        return self

    async def stop(self) -> None:
        await self.server.__aexit__()

    async def worker(self, worker: Worker, url: str = "") -> Host:
        host = Host(worker, url or self.url, context=self._context)
        await host.open()
        self.hosts.append(host)
        return host

    async def client(self, url: str = "") -> Client:
        return await self._clients.enter_async_context(connect(url or self.url, context=self._context))

    async def close(self) -> None:
        await self._clients.aclose()
        for host in self.hosts:
            await host.close()

    @property
    def counts(self) -> dict[str, int]:
        return self.server.core.requests.counts

    def in_flight(self) -> dict[str, int]:
        """Credits spent, by worker."""
        return {peer.name: peer.load for peer in self.server.core.roster.peers.values() if peer.works}

    def queued(self, name: str) -> int:
        """Requests that wait for a service."""
        service = self.server.core.requests.services.get(name)
        return service.queue.count if service is not None else 0

    async def idle(self) -> None:
        """Returns once no request is open, none is in a queue, and all credit is back."""
        requests = self.server.core.requests
        await until(
            lambda: not requests.open and not requests.queued_bytes and not any(self.in_flight().values()),
            f"the end of all requests; in flight: {self.in_flight()}",
        )


@asynccontextmanager
async def cluster(*workers: Worker, limits: Limits = PACE, inproc: bool = False) -> AsyncIterator[Cluster]:
    """A broker with these workers; over tcp, or over inproc with a context of its own."""
    context: zmq.Context[Any] | None = zmq.Context() if inproc else None
    found = await Cluster("inproc://cluster" if inproc else "tcp://127.0.0.1:*", limits, context).start()
    try:
        for worker in workers:
            await found.worker(worker)
        yield found
    finally:
        await found.close()
        await found.stop()
        if context is not None:
            await asyncio.to_thread(context.term)
