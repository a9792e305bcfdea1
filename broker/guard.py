"""Who is let in: CURVE, ZAP, and the list that `ralmq keys` writes. Knows zmq and files, no rule of the broker."""

import logging
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.auth.asyncio import AsyncioAuthenticator

from ..schema.errors import Refused
from ..schema.keys import ALLOWED_FILE, Entry, allowed, broker_key, read_entries

log = logging.getLogger("ralmq.guard")
DOMAIN: Final = "ralmq"
OWN_ID: Final = 5  # bytes of a routing id that a ROUTER draws; the first is 0


class Guard:
    """The door of one ROUTER.

    libzmq asks the authenticator before it takes the first message of a connection; without its answer nobody gets in.

    Args:
        folder: made by `ralmq keys init`.

    Raises:
        Refused: the folder or a file in it is missing or broken, or others may read the broker's key.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = broker_key(folder)
        self._stamp = self._stamp_of()
        self.allowed = allowed(read_entries(folder))

    def start(self, context: zmq.Context[Any]) -> None:
        """Answers for all sockets of this context; needs a running loop."""
        self._authenticator = AsyncioAuthenticator(context)
        self._authenticator.configure_curve_callback(DOMAIN, self)
        self._authenticator.start()

    def arm(self, router: zmq.Socket[bytes]) -> None:
        """For the addresses that it binds from now on."""
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self._key.secret.encode())
        router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody gets in where nobody answers

    def stop(self) -> None:
        self._authenticator.stop()

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked by the authenticator for each new connection."""
        return key.decode() in self.allowed

    def entry(self, key: bytes, frame: zmq.Frame) -> Entry | None:
        """Whose connection a message came over; None for one that was revoked, or that chose its routing id itself.

        An id of its own could be taken over by another peer once its first one has left.
        """
        if len(key) != OWN_ID or key[0]:
            return None
        try:
            user = frame.get("User-Id")
        except zmq.ZMQError:
            return None
        return self.allowed.get(str(user))

    def changed(self) -> bool:
        """Reads the list again where it was written anew; one that cannot be read leaves the old one in force."""
        stamp = self._stamp_of()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self.allowed = allowed(read_entries(self._folder))
        except Refused as error:
            log.error("the list before stays in force: %s", error.message)
            return False
        log.info("%d keys are let in", len(self.allowed))
        return True

    def _stamp_of(self) -> tuple[int, int, int]:
        try:
            found = (self._folder / ALLOWED_FILE).stat()
        except OSError:
            return (0, 0, 0)
        return found.st_mtime_ns, found.st_ino, found.st_size
