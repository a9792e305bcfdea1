"""What strangers may do to a broker's port, with raw sockets. Knows ZMTP's first bytes and no rule of the broker."""

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from relay import RESET

CANARY = b"canary-of-the-attackers"  # in all that is sent here: it must be in no log
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
READY = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
Attack = Callable[[tuple[str, int], random.Random], None]


def greeting(mechanism: bytes) -> bytes:
    """The 64 bytes that open a ZMTP 3.1 connection."""
    return SIGNATURE + b"\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def frame(data: bytes, *, more: bool = False) -> bytes:
    """A ZMTP frame of a message."""
    if len(data) < 256:
        return bytes([more, len(data)]) + data
    return bytes([more | 2]) + len(data).to_bytes(8, "big") + data


@contextlib.contextmanager
def connected(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection; that the broker cuts it is no fault of the attacker."""
    with socket.create_connection(address, timeout=10) as raw, contextlib.suppress(OSError):
        yield raw


def shaken(raw: socket.socket) -> bool:
    """A whole handshake without keys; whether the broker took it."""
    raw.sendall(greeting(b"NULL") + b"\x04" + bytes([len(READY)]) + READY)
    heard = b""
    while b"READY" not in heard:
        if not (more := raw.recv(4096)):
            return False
        heard += more
    return True


def noise(address: tuple[str, int], rng: random.Random) -> None:
    with connected(address) as raw:
        raw.sendall(rng.randbytes(rng.choice((1, 9, 64, 5000))) + CANARY)
        raw.recv(100)


def half_greeting(address: tuple[str, int], rng: random.Random) -> None:
    """A greeting that ends anywhere, or has a byte changed."""
    with connected(address) as raw:
        whole = bytearray(greeting(rng.choice((b"NULL", b"CURVE", b"PLAIN", b"GSSAPI", CANARY[:20]))))
        whole[rng.randrange(64)] ^= 1 << rng.randrange(8)
        raw.sendall(bytes(whole[: rng.randrange(65)]))


def half_handshake(address: tuple[str, int], rng: random.Random) -> None:
    """A right greeting, then a command that is none of its mechanism."""
    with connected(address) as raw:
        raw.sendall(greeting(rng.choice((b"NULL", b"CURVE"))))
        command = rng.choice((b"\x05HELLO", b"\x08INITIATE", b"\x05READY", b"\x05ERROR", b"\x04PING")) + CANARY
        command += rng.randbytes(rng.choice((0, 1, 170, 194)))
        raw.sendall(b"\x04" + bytes([len(command) & 0xFF]) + command)
        raw.recv(200)


def wrong_messages(address: tuple[str, int], rng: random.Random) -> None:
    """A whole handshake, then messages that are none."""
    with connected(address) as raw:
        if not shaken(raw):
            return
        for _ in range(8):
            parts = [rng.randbytes(rng.choice((0, 1, 32, 36, 300))) + CANARY for _ in range(rng.choice((1, 2, 70)))]
            raw.sendall(b"".join(frame(part, more=True) for part in parts[:-1]) + frame(parts[-1]))
        raw.recv(100)


def absurd_lengths(address: tuple[str, int], rng: random.Random) -> None:
    """A frame that claims more than a message, or than memory, may have."""
    with connected(address) as raw:
        if shaken(raw):
            claim = rng.choice(((1 << 63) - 1, (1 << 64) - 1, 1 << 40, 300 << 20, 256 << 20))
            raw.sendall(bytes([rng.choice((2, 3, 6))]) + claim.to_bytes(8, "big") + CANARY * 20)
            raw.recv(100)


def reset(address: tuple[str, int], rng: random.Random) -> None:
    """Opened and reset at once, at times in the middle of a message."""
    with connected(address) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if rng.random() < 0.5 and shaken(raw):
            raw.sendall(frame(CANARY, more=True))


ATTACKS: list[Attack] = [noise, half_greeting, half_handshake, wrong_messages, absurd_lengths, reset]


class Siege:
    """Every attack in a thread of its own, over and over, until the block ends."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._over = threading.Event()
        self.rounds = [0] * len(ATTACKS)

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(len(ATTACKS))
        self._running = [self._pool.submit(self._attack, number) for number in range(len(ATTACKS))]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for running in self._running:
            running.result()

    def _attack(self, number: int) -> None:
        rng = random.Random(number)
        while not self._over.is_set():
            ATTACKS[number](self._address, rng)
            self.rounds[number] += 1


@contextlib.contextmanager
def half_open(address: tuple[str, int], count: int) -> Iterator[None]:
    """Connections that say nothing, or a greeting and then nothing."""
    with contextlib.ExitStack() as stack:
        for n in range(count):
            raw = stack.enter_context(socket.create_connection(address, timeout=10))
            if n % 2:
                raw.sendall(greeting(b"NULL")[: 10 + n // 2])
        yield
