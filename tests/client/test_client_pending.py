"""One request seen from the asker, without a link: parts in order, each once; credit; its one end."""

import asyncio

import pytest
from ralmq import errors
from ralmq.client.pending import Pending
from ralmq.schema.frame import Prefix
from ralmq.schema.message import Error, Final, Partial

ID = b"i" * 16


def pending_of(window: int = 0) -> Pending:
    pending = Pending(ID, [], 0.0, window)
    pending.sent = 1
    return pending


def part(pending: Pending, number: int, attempt: int = 0) -> None:
    pending.take(Prefix(1, 17, attempt=attempt, sequence=number & 0xFFFF, id=ID), Partial({"n": number}))


def end(pending: Pending, message: Final | Error, attempt: int = 0) -> None:
    pending.take(Prefix(1, 18, attempt=attempt, id=ID), message)


async def read(pending: Pending) -> list[int]:
    """The parts up to the FINAL."""
    found = []
    while isinstance(message := await pending.next(), Partial):
        found.append(message.body["n"])
    return found


@pytest.mark.parametrize("seen", [3, 40_000, 1 << 16, (1 << 16) + 40_000, 3 << 16])
async def test_sequence_numbers_wrap_and_a_replay_is_passed_over(seen: int) -> None:
    pending = pending_of()
    for number in range(seen):
        part(pending, number)
    pending.sent = 2
    for number in range(seen):  # sent again by the asker: an attempt of its own
        part(pending, number, attempt=1)
    part(pending, seen, attempt=1)
    part(pending, seen + 1, attempt=0)  # late, of the attempt before
    for number in range(seen + 3):  # given to another worker by the broker: the same attempt
        part(pending, number, attempt=1)
    end(pending, Final(), attempt=0)
    end(pending, Final({"end": 1}), attempt=1)
    assert await read(pending) == list(range(seen + 3))


async def test_a_replay_that_ends_early_loses_nothing_and_a_second_takes_over() -> None:
    pending = pending_of()
    for numbers in (range(5), range(2), range(8)):
        for number in numbers:
            part(pending, number)
    end(pending, Final())
    assert await read(pending) == list(range(8))


@pytest.mark.parametrize(("window", "grants"), [(1, 1), (2, 1), (3, 1), (64, 32)])
async def test_credit_is_granted_by_half_windows(window: int, grants: int) -> None:
    pending = pending_of(window)
    granted: list[int] = []
    pending.grant = granted.append
    for number in range(200):
        part(pending, number)
    for taken in range(1, 201):
        await pending.next()
        assert pending.granted == taken - taken % grants + window
    assert granted == [taken + window for taken in range(grants, 201, grants)]


async def test_the_first_end_counts_and_is_read_after_the_parts() -> None:
    pending = pending_of()
    part(pending, 0)
    end(pending, Error("busy", "later", 1500))
    end(pending, Final())
    pending.end(errors.ConnectionClosed("closed"))
    part(pending, 1)
    assert isinstance(await pending.next(), Partial)
    with pytest.raises(errors.Busy, match="later") as caught:
        await pending.next()
    assert caught.value.retry_after == 1.5 and caught.value.request_id == ID
    with pytest.raises(errors.RequestCancelled):
        await pending.next()


async def test_a_reader_that_is_cancelled_makes_room_for_another() -> None:
    pending = pending_of()
    reading = asyncio.create_task(pending.next())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await pending.next()
    reading.cancel()
    await asyncio.wait([reading])
    again = asyncio.create_task(pending.next())
    await asyncio.sleep(0)
    part(pending, 0)
    assert isinstance(await again, Partial)


async def test_an_error_of_a_later_version_is_still_an_error() -> None:
    pending = pending_of()
    end(pending, Error("of_tomorrow", "what it says"))
    with pytest.raises(errors.RalmqError, match="what it says") as caught:
        await pending.next()
    assert type(caught.value) is errors.RalmqError


async def test_a_part_that_comes_twice_is_passed_over() -> None:
    pending = pending_of()
    for number in (0, 1, 1, 2, 3, 2, 3, 4):
        part(pending, number)
    end(pending, Final())
    assert await read(pending) == list(range(5))


async def test_a_part_that_was_left_out_is_the_end() -> None:
    pending = pending_of()
    for number in (0, 1, 3):
        part(pending, number)
    end(pending, Final())
    assert [(await pending.next()).body["n"] for _ in range(2)] == [0, 1]
    with pytest.raises(errors.WorkerLost, match="left a part"):
        await pending.next()
