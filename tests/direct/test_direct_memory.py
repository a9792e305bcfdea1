"""Shared memory between peers: what is in use is not written to, what is no such memory is not read."""

import fcntl
import gc
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ralmq.schema.errors import Malformed
from ralmq.workers.direct.memory import LEAST, MARK, SLOTS, Slots, Views

HEAD = b"head"
LARGE = np.random.default_rng(0).integers(0, 255, 3 * LEAST + 5, np.uint8)


class Pair:
    """Both sides in one process; what is let go comes back at once."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.views = Views(lambda sender, message: self.slots.freed(message))

    def over(self, *frames: object) -> list[memoryview]:
        placed = self.slots.placed([HEAD, *frames])
        return self.views.whole(b"me", placed) if placed[0][0] == MARK else placed


def used(slots: Slots) -> int:
    return sum(slot.busy for slot in slots._slots)


def test_large_frames_arrive_in_their_places_and_small_ones_beside_them() -> None:
    pair = Pair()
    found = pair.over(b"small", LARGE.data, b"", LARGE[:LEAST].data)
    wanted = [HEAD, b"small", LARGE.tobytes(), b"", LARGE[:LEAST].tobytes()]
    assert [bytes(frame) for frame in found] == wanted
    assert used(pair.slots) == 2


def test_a_message_without_a_large_frame_is_left_alone() -> None:
    slots = Slots()
    frames = [HEAD, LARGE[: LEAST - 1].data, b""]
    assert slots.placed(frames) is frames
    assert not slots._slots


def test_a_slot_is_free_when_the_last_view_of_it_is_gone() -> None:
    pair = Pair()
    found = pair.over(LARGE.data)
    array = np.frombuffer(found[1], np.uint8)[7:].reshape(1, -1)
    del found
    gc.collect()
    assert used(pair.slots) == 1, "an array still shows it"
    assert np.array_equal(array[0], LARGE[7:])
    del array
    gc.collect()
    assert used(pair.slots) == 0
    for _ in range(5):
        pair.over(LARGE.data)
        gc.collect()
    assert len(pair.slots._slots) == 1


def test_what_is_in_use_is_not_written_to() -> None:
    pair = Pair()
    held = [pair.over(np.full(LEAST, number, np.uint8).data)[1] for number in range(SLOTS + 3)]
    assert len(pair.slots._slots) == SLOTS
    assert [set(bytes(frame)) for frame in held] == [{number} for number in range(SLOTS + 3)]


def test_slots_that_are_too_small_make_room_for_larger_ones() -> None:
    pair = Pair()
    held = [pair.over(LARGE[:LEAST].data) for _ in range(SLOTS)]
    del held
    gc.collect()
    found = pair.over(LARGE.data)
    assert bytes(found[1]) == LARGE.tobytes()
    assert used(pair.slots) == 1 and len(pair.slots._slots) == SLOTS


def test_what_was_read_stays_when_the_sender_closes() -> None:
    pair = Pair()
    found = pair.over(LARGE.data)
    pair.slots.close()
    assert bytes(found[1]) == LARGE.tobytes()


def test_a_process_that_follows_under_the_same_number_is_another_one() -> None:
    """What the reader has mapped of the one that is gone is not taken for what this one has sent."""
    script = "from ralmq.workers.direct.memory import _serials; print(next(_serials))"
    found = [subprocess.check_output([sys.executable, "-c", script]) for _ in range(2)]
    assert found[0] != found[1]


def _envelope(*entries: tuple[int, int, int, int], count: int = -1) -> bytes:
    head = struct.pack("<BxHI", MARK, len(entries) if count < 0 else count, os.getpid())
    return head + b"".join(struct.pack("<HxxIQQ", *entry) for entry in entries)


def test_what_is_no_envelope_is_refused(tmp_path: Path) -> None:
    plain = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT)
    os.write(plain, b"x" * 100)
    loose = os.memfd_create("ralmq-direct", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 4096)
    sealed = os.memfd_create("ralmq-direct", os.MFD_ALLOW_SEALING)
    os.ftruncate(sealed, 4096)
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    views = Views(lambda sender, message: None)
    try:
        assert bytes(views.whole(b"", [_envelope((0, sealed, 1, 4096))])[0]) == bytes(4096)
        for head, why in (
            (_envelope((0, plain, 2, 100)), "something else than shared memory"),
            (_envelope((0, loose, 3, 4096)), "may shrink"),
            (_envelope((0, sealed, 1, 4097)), "more bytes"),
            (_envelope((0, 9999, 4, 1)), "cannot be opened"),
            (_envelope((1, sealed, 1, 1)), "a place that is none"),
            (_envelope((0, sealed, 1, 1), count=2), "broken envelope"),
            (bytes([MARK]), "broken envelope"),
            (_envelope(count=65), "broken envelope"),
        ):
            with pytest.raises(Malformed, match=why):
                views.whole(b"", [head])
        with pytest.raises(Malformed, match="more frames"):
            views.whole(b"", [_envelope((0, sealed, 1, 1)), *[b""] * 64])
    finally:
        for descriptor in (plain, loose, sealed):
            os.close(descriptor)
