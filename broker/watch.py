"""Finds connections that libzmq keeps too much of: a message that never ends, or more messages than are taken.

Its own bound on messages that wait, RCVHWM, is of no use: a socket that stops reading at it aborts the process when the
peer ends within a heartbeat's interval (libzmq 4.3.5, assertion `!_io_error`), or is lost for want of the heartbeats
that are not read. Knows byte counts, no message.
"""

import contextlib
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..schema.limits import MAX_MESSAGE

FIRST: Final = 1 << 20  # bytes; what comes first is a HELLO, and far shorter
LONGEST: Final = MAX_MESSAGE + (1 << 20)
AHEAD: Final = 2 * LONGEST  # bytes that libzmq may keep of one connection; a message under way is half of it at most
CROWDED: Final = 64 << 20  # bytes beside the contents of short messages, while the broker's memory is full
KEPT: Final = 250  # bytes that libzmq keeps for a short frame beside what it holds: measured
SEALED: Final = 33  # bytes that CURVE adds to a frame
INFO: Final = struct.Struct("=128xQ")  # of Linux' struct tcp_info: tcpi_bytes_received


@dataclass(slots=True)
class Flow:
    """One connection: bytes received when its last whole message was seen, and when it was asked for the next one."""

    base: int = 0
    asked: int = -1
    known: bool = False
    mark: int = 0  # bytes received when what is taken of it began to be counted
    ahead: bool = False  # at the look before


@dataclass(slots=True)
class Taken:
    """What was taken of a connection: bytes as they travelled, and frames."""

    bytes: int = 0
    frames: int = 0

    def add(self, frames: Sequence[Any], sealed: bool) -> None:
        """Adds a message: ZMTP puts 2 bytes before a short frame, 9 before a long one."""
        for frame in frames:
            size = len(frame) + SEALED * sealed
            self.bytes += size + (2 if size < 256 else 9)
        self.frames += len(frames)


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
        flow = self._flows.get(descriptor)
        if flow is not None:
            flow.base, flow.asked, flow.known = received(descriptor), -1, True

    def mark(self) -> None:
        """From now on all that is taken is counted, and told to `ahead`."""
        for descriptor, flow in self._flows.items():
            flow.mark, flow.ahead = received(descriptor), False

    def ahead(self, taken: Mapping[int, Taken], full: bool) -> set[int]:
        """Descriptors of those of which libzmq keeps too much, at two looks in a row, by what was taken since the mark.

        What waits is as long as what was taken, and a frame of 60 bytes costs 310; but it may end in a message of any
        length that is under way. While memory is `full`, that is not believed of one who sends short ones.
        """
        found: set[int] = set()
        for descriptor, flow in self._flows.items():
            served = taken.get(descriptor)
            before, flow.ahead = flow.ahead, False
            if served is not None and served.bytes:
                waiting = received(descriptor) - flow.mark - served.bytes
                beside = KEPT * served.frames / served.bytes
                certain = waiting + beside * max(0, waiting - LONGEST)
                flow.ahead = certain > AHEAD or (full and beside * waiting > CROWDED)
            if before and flow.ahead:
                found.add(descriptor)
        return found

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
