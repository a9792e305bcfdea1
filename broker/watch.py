"""Finds connections whose message never ends: libzmq keeps all its parts. Knows byte counts, no message."""

import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import Final

from ..schema.limits import MAX_MESSAGE

FIRST: Final = 1 << 20  # bytes; what comes first is a HELLO, and far shorter
LONGEST: Final = MAX_MESSAGE + (1 << 20)
INFO: Final = struct.Struct("=128xQ")  # of Linux' struct tcp_info: tcpi_bytes_received


@dataclass(slots=True)
class Flow:
    """One connection: bytes received when its last whole message was seen, and when it was asked for the next one."""

    base: int = 0
    asked: int = -1
    known: bool = False


class Watch:
    """Connections by descriptor. A look costs some microseconds for each; a message costs nothing.

    Before its first whole message a connection has little to say. Later, one that has received much since its last is
    a suspect, and the shell says when the next comes; one that receives more than any message may have is endless.
    """

    def __init__(self) -> None:
        self._flows: dict[int, Flow] = {}

    def opened(self, descriptor: int) -> None:
        self._flows[descriptor] = Flow()

    def closed(self, descriptor: int) -> None:
        self._flows.pop(descriptor, None)

    def whole(self, descriptor: int) -> None:
        """A message has arrived whole, the first one or the first since this was a suspect."""
        if descriptor in self._flows:
            self._flows[descriptor] = Flow(received(descriptor), known=True)

    def look(self) -> tuple[set[int], set[int]]:
        """Descriptors of new suspects, and of those whose message does not end."""
        suspects: set[int] = set()
        endless: set[int] = set()
        for descriptor, flow in self._flows.items():
            got = received(descriptor)
            if not flow.known:
                if got > FIRST:
                    endless.add(descriptor)
            elif flow.asked >= 0:
                if got - flow.asked > LONGEST:
                    endless.add(descriptor)
            elif got - flow.base > FIRST:
                flow.asked = got
                suspects.add(descriptor)
        return suspects, endless


def received(descriptor: int) -> int:
    """Bytes that a TCP connection has received; 0 for anything else."""
    with contextlib.suppress(OSError), socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as handle:
        info = handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO.size)
        if len(info) == INFO.size:
            return int(INFO.unpack(info)[0])
    return 0


def cut(descriptor: int) -> None:
    """Ends a connection of libzmq, which has no call for it; what else the descriptor may be now is left alone."""
    with contextlib.suppress(OSError), socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as handle:
        handle.getpeername()  # a listener has none
        handle.shutdown(socket.SHUT_RDWR)
