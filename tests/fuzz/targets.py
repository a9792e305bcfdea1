"""Bytes as a case: frames for `decode`, or a list of acts for the broker's core. Knows no fuzzer."""

import random
from collections.abc import Callable
from pathlib import Path

from fuzz.driver import EPOCH, OWN, PEERS, Driver, Frames
from ralmq.schema.codec import decode, encode, routing_of
from ralmq.schema.errors import Malformed
from ralmq.schema.frame import Prefix
from schema_samples import SAMPLES, same

REGRESSIONS = Path(__file__).parent / "regressions"
KNOWN = range(1, len(PEERS))  # who is there when a case begins; the first is not
ACTS = 160  # most of one case


class Cursor:
    """Numbers and bytes from a case; zeros behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def byte(self) -> int:
        """0 to 255."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def word(self) -> int:
        """0 to 65535."""
        return self.byte() | self.byte() << 8

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]


def frames_in(cursor: Cursor) -> Frames:
    """A count, the length of each frame but the last, which has the rest where nothing follows."""
    count = cursor.byte() % 70
    return [cursor.take(cursor.word()) for _ in range(count)]


def case_of(frames: Frames) -> bytes:
    """The frames as `frames_in` reads them; longer ones are cut."""
    parts = [bytes(frame)[:0xFFFF] for frame in frames]
    return bytes([len(parts)]) + b"".join(len(part).to_bytes(2, "little") + part for part in parts)


# -- decode


def run_decode(data: bytes) -> None:
    """A message or Malformed; what is taken can be sent on and is the same again."""
    frames = frames_in(Cursor(data))
    try:
        prefix, message = decode(frames)
    except Malformed:
        return
    for tensor in getattr(message, "tensors", ()):
        if tensor.numpy().shape != tensor.shape:
            raise AssertionError(f"{tensor} became another shape")
    routing_of(frames[0])
    stamp = {name: value for name, value in prefix._asdict().items() if name not in {"version", "kind"}}
    again: tuple[Prefix, object] = decode(encode(message, **stamp))
    kept = same(message, again[1]) or repr(message) == repr(again[1])  # a body may hold NaN, not equal to itself
    if again[0]._replace(flags=0) != prefix._replace(flags=0) or not kept:
        raise AssertionError("what was decoded is another message when it is sent on")


# -- the core


def run_core(data: bytes) -> None:
    """The case is a list of acts, each a number and what it needs; raises Broken where one breaks a promise."""
    cursor = Cursor(data)
    begin = cursor.byte()
    driver = Driver(keys=bool(begin & 1))
    if begin & 2:
        for peer in KNOWN:
            driver.ready(peer)
    for _ in range(ACTS):
        if cursor.left <= 0:
            break
        act = cursor.byte()
        DEEDS[act % len(DEEDS)](driver, cursor, act // len(DEEDS))
    driver.close()


def _hello(driver: Driver, cursor: Cursor, more: int) -> None:
    peer, nonce, offer = cursor.byte(), cursor.byte(), cursor.byte()
    services = [n for n in range(3) if offer >> n & 1]
    span = (offer >> 3) % 8 - 1 if not services else -1
    idempotent = bool(offer & 64)
    driver.hello(
        peer, nonce, services, span, capacity=more % 4, idempotent=idempotent, stall_ms=500 + (offer & 128) * 9
    )


def _usual(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.ready(cursor.byte())


def _ask(driver: Driver, cursor: Cursor, more: int) -> None:
    peer, request, how, deadline = cursor.byte(), cursor.byte(), cursor.byte(), cursor.byte()
    driver.ask(
        peer,
        request,
        how,
        attempt=how >> 2,
        deadline=deadline * 20,
        size=request // 6 * 250,
        priority=more % 10,
        parent=deadline if more & 1 else None,
        wait_ms=deadline * 30,
    )


def _ask_anew(driver: Driver, cursor: Cursor, more: int) -> None:
    peer, request, deadline = cursor.byte() // 3 * 3, cursor.byte(), cursor.byte()
    driver.ready(peer)
    parent = deadline if more & 1 else None
    driver.ask(peer, request, more, deadline=deadline * 20, size=request // 6 * 250, parent=parent, fresh=True)


def _operate(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.operate(cursor.byte(), cursor.byte(), more % len(OWN), cursor.byte(), attempt=more // len(OWN))


def _answer(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.answer(cursor.byte(), cursor.byte(), more)


def _claim(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.claim(cursor.byte(), cursor.byte(), cursor.byte(), more)


def _beat(driver: Driver, cursor: Cursor, more: int) -> None:
    active = [(cursor.byte(), cursor.byte() % 5) for _ in range(more % 4)] if more & 4 else None
    driver.beat(cursor.byte(), cursor.byte(), more & 1, active)


def _steer(driver: Driver, cursor: Cursor, more: int) -> None:
    peer, request, attempt = cursor.byte(), cursor.byte(), cursor.byte()
    if more % 2:
        driver.credit(peer, request, attempt, cursor.byte())
    else:
        driver.cancel(peer, request, attempt)


def _hop(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.hop(cursor.byte(), bool(more & 1), bool(more & 2))


def _leave(driver: Driver, cursor: Cursor, more: int) -> None:
    peer = cursor.byte()
    if more % 4 == 0:
        driver.bye(peer)
    elif more % 4 == 1:
        driver.lost(peer)
    elif more % 4 == 2:
        driver.stale(peer, cursor.byte())
    else:
        driver.introduce(peer, cursor.byte())


def _wait(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.wait((0, 10, 50, 200, 500, 1000, 1500, 5000)[more % 8])


def _look(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.memory(bool(more & 1))
    driver.status()


def _raw(driver: Driver, cursor: Cursor, more: int) -> None:
    driver.raw(cursor.byte(), frames_in(cursor))


def _spoilt(driver: Driver, cursor: Cursor, more: int) -> None:
    """A sample, as it is or with bytes changed, under an id that is under way."""
    peer, sample = cursor.byte(), SAMPLES[cursor.byte() % len(SAMPLES)]
    hand = driver.hand(peer) if more & 1 else []
    identity, leg = hand[0] if hand else (driver.ids[more % len(driver.ids)], cursor.byte() % 4)
    frames = [bytearray(frame) for frame in encode(sample, id=identity, attempt=leg, epoch=EPOCH)]
    for _ in range(cursor.byte() % 4):
        at, value = cursor.byte(), cursor.byte()
        frames[0][at % len(frames[0])] = value
    driver.raw(peer, [bytes(frame) for frame in frames])


DEEDS: list[Callable[[Driver, Cursor, int], None]] = [
    _hello, _usual, _ask, _ask_anew, _ask_anew, _operate, _answer, _answer, _claim, _beat,
    _steer, _hop, _leave, _wait, _look, _raw, _spoilt,
]  # fmt: skip

TARGETS: dict[str, Callable[[bytes], None]] = {"decode": run_decode, "core": run_core}


def seeds(target: str) -> list[bytes]:
    """What a run begins with: each sample encoded, or lists of acts around one sample each."""
    whole = [[bytes(frame) for frame in encode(sample, id=b"request 0000001.", epoch=EPOCH)] for sample in SAMPLES]
    if target == "decode":
        return [case_of(frames) for frames in whole]
    raw = DEEDS.index(_raw)
    rng = random.Random(1)
    found = [bytes([2]) + rng.randbytes(400) for _ in range(40)]
    for peer, frames in enumerate(whole):
        if sum(map(len, frames)) < 3000:
            acts = b"".join(bytes([rng.randrange(15)]) + rng.randbytes(4) for _ in range(20))
            found.append(bytes([2]) + acts + bytes([raw, peer]) + case_of(frames) + acts)
    return found
