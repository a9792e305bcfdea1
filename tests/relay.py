"""A TCP relay that a test cuts or stops: the network between a peer and its broker."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

from serving import free_url

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


class Relay:
    """Forwards connections at `url` to a broker's address."""

    def __init__(self, target: str) -> None:
        self.url = free_url()
        self.connections = 0  # made so far
        self._target = _address(target)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, *_address(self.url))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Ends all connections; new ones may be made at once."""
        for writer in list(self._writers):
            writer.transport.abort()
        self._writers.clear()

    def reset(self) -> None:
        """The same by RST: who has not read all that arrived hears of it at once."""
        for writer in self._writers:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.cut()

    def stop(self) -> None:
        """Forwards nothing any more, as a network that drops all packets."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            try:
                there, back = await asyncio.open_connection(*self._target)
            except OSError:  # nobody is there: as a proxy does, it took the connection, and closes it
                writer.transport.abort()
                raise
            self._writers |= {writer, back}
            ways = [asyncio.ensure_future(way) for way in (self._pass(reader, back), self._pass(there, writer))]
            self._tasks |= set(ways)
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            self._tasks -= set(ways)
            for end in (writer, back):
                end.transport.abort()
                self._writers.discard(end)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    return host, int(port)
