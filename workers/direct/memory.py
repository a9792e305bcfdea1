"""Large frames between processes of one host through shared memory, each copied once. Knows no socket.

The memory is anonymous (memfd) and opened by the other side through /proc: when both have ended, however they end,
nothing of it is left. It is sealed against shrinking, so that no reader can be made to read beyond its end.
"""

import contextlib
import fcntl
import itertools
import mmap
import os
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...schema.errors import Malformed
from ...schema.limits import MAX_FRAMES, MAX_MESSAGE

LEAST: Final = 1 << 18  # bytes of a frame from which on it wins: see docs/parallel.md
SLOTS: Final = 4  # of one lane; while all are in use, frames go with their message
MARK: Final = 0xFF  # first byte of an envelope; frame 0 of a message begins with the protocol's version
NAME: Final = "ralmq-direct"
MAPPED: Final = 2 * SLOTS  # slots of others that stay mapped
UNREAD: Final = b"\0"  # what the reader says of an envelope whose memory it cannot read
_HEAD: Final = struct.Struct("<BxHI")  # MARK, entries, process
_ENTRY: Final = struct.Struct("<HxxIQQ")  # place among the frames, descriptor, serial number, bytes
_FREED: Final = struct.Struct("<Q")

# From anywhere: a process that has the number of one that is gone must not name what that one named.
_serials = itertools.count(int.from_bytes(os.urandom(6)))
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(slots=True, eq=False)
class _Slot:
    serial: int
    descriptor: int
    memory: mmap.mmap
    busy: bool = False

    def close(self) -> None:
        self.memory.close()
        os.close(self.descriptor)


class Slots:
    """The sender's side: memory that frames are copied into, free again when the reader says so.

    One thread places frames at a time; `freed` may be called in another meanwhile.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def placed(self, frames: list[Any]) -> list[Any]:
        """The message as it travels: an envelope that says where its large frames lie, and the others.

        Unchanged where none is large, or no slot is free.
        """
        entries: list[bytes] = []
        left: list[Any] = []
        for place, frame in enumerate(frames):
            size = len(frame)
            slot = self._free(size) if place and LEAST <= size <= MAX_MESSAGE else None
            if slot is None:
                left.append(frame)
                continue
            slot.busy = True
            np.frombuffer(slot.memory, np.uint8)[:size] = np.frombuffer(frame, np.uint8)
            entries.append(_ENTRY.pack(place, slot.descriptor, slot.serial, size))
        if not entries:
            return frames
        return [_HEAD.pack(MARK, len(entries), os.getpid()) + b"".join(entries), *left]

    def freed(self, message: Any) -> None:
        """The reader does not need a slot any more."""
        if len(message) == _FREED.size:
            serial = _FREED.unpack(message)[0]
            for slot in list(self._slots):
                if slot.serial == serial:
                    slot.busy = False

    def close(self) -> None:
        """Readers keep what they have mapped."""
        for slot in self._slots:
            slot.close()
        self._slots.clear()

    def _free(self, size: int) -> _Slot | None:
        idle = sorted((slot for slot in self._slots if not slot.busy), key=lambda slot: len(slot.memory))
        for slot in idle:
            if len(slot.memory) >= size:
                return slot
        if len(self._slots) == SLOTS:
            if not idle:
                return None
            idle[0].close()
            self._slots.remove(idle[0])
        try:
            slot = _made(1 << (size - 1).bit_length())
        except OSError:  # no memory, no descriptor: then without
            return None
        self._slots.append(slot)
        return slot


def _made(size: int) -> _Slot:
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return _Slot(next(_serials), descriptor, mmap.mmap(descriptor, size))
    except BaseException:
        os.close(descriptor)
        raise


class Views:
    """The reader's side: frames as views of another process's memory, which is told when they are not used any more.

    Args:
        freed: called with who sent the message and what to send back, in whatever thread lets go of the last view.
    """

    def __init__(self, freed: Callable[[bytes, bytes], None]) -> None:
        self._freed = freed
        self._mapped: OrderedDict[tuple[int, int], Bytes] = OrderedDict()

    def whole(self, sender: bytes, frames: list[Any]) -> list[Any]:
        """The message that was sent, its large frames in their places.

        Raises:
            Malformed: no envelope as `Slots.placed` makes them, or memory that cannot be read.
        """
        head, *rest = frames
        try:
            mark, count, process = _HEAD.unpack_from(head)
            entries = [_ENTRY.unpack_from(head, _HEAD.size + place * _ENTRY.size) for place in range(count)]
        except struct.error as error:
            raise Malformed(f"a broken envelope: {error}") from None
        if mark != MARK or len(rest) + count > MAX_FRAMES:
            raise Malformed("no envelope, or more frames than a message has")
        for place, descriptor, serial, size in entries:
            if place > len(rest):
                raise Malformed("an envelope names a place that is none")
            rest.insert(place, self._view(sender, process, descriptor, serial, size).data)
        return rest

    def forget(self) -> None:
        """Keeps nothing mapped but what is in use."""
        self._mapped.clear()

    def _view(self, sender: bytes, process: int, descriptor: int, serial: int, size: int) -> Bytes:
        key = (process, serial)
        if key not in self._mapped:
            self._mapped[key] = _mapped(process, descriptor)
            while len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(key)
        if size > len(self._mapped[key]):
            raise Malformed("an envelope names more bytes than its memory has")
        view = self._mapped[key][:size]
        weakref.finalize(view, self._freed, sender, _FREED.pack(serial)).atexit = False
        return view


def _mapped(process: int, descriptor: int) -> Bytes:
    """Raises Malformed unless it is memory of `Slots` in a process of this user."""
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise Malformed("an envelope names something else than shared memory")
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.closing(os.fdopen(number, "rb")):
            if not fcntl.fcntl(number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise Malformed("shared memory that may shrink")
            return np.frombuffer(mmap.mmap(number, 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise Malformed(f"shared memory cannot be opened: {error}") from None
