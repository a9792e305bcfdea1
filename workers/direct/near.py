"""Messages of frames between processes of one host, over a Unix stream socket in the event loop. Knows no message.

A ZeroMQ socket would have two more threads take part in each hop, which costs several times what the hop itself does.
In front of each message: the number of its frames and the bytes of each, unsigned 32-bit integers, little endian.
"""

import asyncio
import logging
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ...schema.limits import MAX_FRAMES, MAX_MESSAGE

log = logging.getLogger("ralmq.direct")
SCHEME: Final = "ipc://@"  # of an address: a name without a file, as ZeroMQ writes it
CHUNK: Final = 1 << 17  # bytes that are read at a time; a larger message is read into memory of its own
LARGEST: Final = MAX_MESSAGE + (1 << 20)
BACKLOG: Final = 128
PAUSE: Final = 1.0  # seconds, where no connection can be taken
_COUNT: Final = struct.Struct("<I")
_USER: Final = struct.Struct("iII")  # process, user, group of the other side
_HEADS: Final = [struct.Struct(f"<{1 + count}I") for count in range(MAX_FRAMES + 1)]


class Stream:
    """One connection. Frames keep their order. `send` may be called in any thread, all else in the event loop.

    Args:
        take: called with the frames (read-only memoryviews) of each message, within the event loop.
        ended: called once, later, where the other side has ended, or sent what is no message.
    """

    def __init__(self, connected: socket.socket, take: Callable[[list[Any]], None], ended: Callable[[], None]) -> None:
        connected.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._socket = connected
        self._take = take
        self._ended = ended
        self._closed = False
        self._sending = threading.Lock()
        self._out: deque[memoryview] = deque()  # what the socket has not taken yet
        self._in: deque[list[Any]] = deque()  # messages that have come and are not taken yet
        self._read = bytearray(CHUNK)
        self._have = 0  # bytes in `_read`
        self._body = bytearray()  # of a message that is larger, head and all, while it comes
        self._filled = 0
        self._loop.add_reader(connected.fileno(), self._readable)

    def send(self, frames: list[Any]) -> None:
        """Sends; what the socket does not take at once is copied, and leaves in its order."""
        views = [memoryview(frame).cast("B") for frame in frames]
        parts = [memoryview(_HEADS[len(views)].pack(len(views), *map(len, views))), *views]
        with self._sending:
            if self._closed:
                return
            if self._out:
                self._out += map(_copied, parts)
                return
            sent = self._put(parts)
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                else:
                    self._out.append(_copied(part[sent:]))
                    sent = 0
            if self._out:
                self._loop.call_soon_threadsafe(self._write)

    def close(self) -> None:
        """What has not left yet is dropped."""
        with self._sending:
            if self._closed:
                return
            self._closed = True
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._out.clear()
        self._in.clear()

    # -- inside

    def _put(self, parts: list[memoryview]) -> int:
        """How many bytes the socket took; all, where the other side is gone and nobody will have them."""
        try:
            return self._socket.sendmsg(parts)
        except BlockingIOError:
            return 0
        except (BrokenPipeError, ConnectionResetError):  # what it sent before it ended is read first; its end is behind
            pass
        except OSError:
            self._loop.call_soon_threadsafe(self._end)
        return sum(map(len, parts))

    def _write(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        with self._sending:
            while self._out:
                sent = self._put([self._out[0]])
                if sent < len(self._out[0]):
                    self._out[0] = self._out[0][sent:]
                    return
                self._out.popleft()
            self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        """Takes what has come, at most a chunk or the rest of one large message."""
        into = memoryview(self._body)[self._filled :] if self._body else memoryview(self._read)[self._have :]
        try:
            count = self._socket.recv_into(into)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._end()
        elif self._body:
            self._filled += count
            if self._filled == len(self._body):
                body, self._body = self._body, bytearray()
                self._in.append(_frames(memoryview(body).toreadonly()))
        else:
            self._have += count
            self._parse()
        self._give()

    def _parse(self) -> None:
        """The whole messages of what was read; of the last one its beginning stays, or goes where its rest will."""
        read, begin = self._read, 0
        while self._have - begin >= _COUNT.size:
            (count,) = _COUNT.unpack_from(read, begin)
            if not 0 < count <= MAX_FRAMES:
                self._end()
                return
            head = _HEADS[count]
            if self._have - begin < head.size:
                break
            size = head.size + sum(head.unpack_from(read, begin)[1:])
            if size > LARGEST:
                self._end()
                return
            if self._have - begin < size:
                if size > CHUNK:
                    self._body = bytearray(size)
                    self._filled = self._have - begin
                    self._body[: self._filled] = read[begin : self._have]
                    begin = self._have
                break
            self._in.append(_frames(memoryview(bytes(memoryview(read)[begin : begin + size]))))
            begin += size
        if begin:
            rest = self._have - begin
            read[:rest] = read[begin : self._have]
            self._have = rest

    def _give(self) -> None:
        try:
            while self._in:
                self._take(self._in.popleft())
        finally:  # one message that cannot be served must not hold up the others
            if self._in:
                self._loop.call_soon(self._give)

    def _end(self) -> None:
        if not self._closed:
            waiting = list(self._in)
            self.close()
            self._in.extend(waiting)  # they came before it ended
            self._loop.call_soon(self._ended)


def _copied(part: memoryview) -> memoryview:
    return memoryview(bytes(part))


def _frames(message: memoryview) -> list[Any]:
    """The frames of a message behind its head."""
    head = _HEADS[_COUNT.unpack_from(message)[0]]
    begin, found = head.size, []
    for size in head.unpack_from(message)[1:]:
        found.append(message[begin : begin + size])
        begin += size
    return found


class Listener:
    """A name at which processes of this user on this host connect.

    Args:
        came: called with each connection.

    Raises:
        OSError: there is no such kind of socket here.
    """

    def __init__(self, name: str, came: Callable[[socket.socket], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._came = came
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind("\0" + name)
            self._socket.listen(BACKLOG)
        except OSError:
            self._socket.close()
            raise
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket.fileno(), self._connected)

    def _connected(self) -> None:
        try:
            other, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor is left: it stays in line, and asking again at once would never end
            log.warning("a connection of this host waits for %g s: %s (see `ulimit -n`)", PAUSE, error.strerror)
            self._loop.remove_reader(self._socket.fileno())
            self._pause = self._loop.call_later(PAUSE, self._listen)
            return
        if user_of(other) == os.getuid():
            self._came(other)
        else:
            other.close()


def connected(name: str) -> socket.socket:
    """A connection to a listener.

    Raises:
        OSError: nobody listens there.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.connect("\0" + name)
    except OSError:
        made.close()
        raise
    return made


def user_of(other: socket.socket) -> int:
    """The number of the user whose process is at the other side."""
    return int(_USER.unpack(other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _USER.size))[1])
