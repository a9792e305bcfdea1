"""Host names, looked up beside the event loop and again while there is no connection. Knows names, no socket of ours.

libzmq looks a name up in its own I/O thread, which stands still, heartbeats too, while a name server is silent: 10 s a
time in a container that was cut off from its network.
"""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Callable
from typing import Final

AGAIN: Final = 1.0  # seconds until it is asked again, whether or not an answer has come
EACH: Final = 3  # questions for which one of several addresses is tried: TCP may take two seconds, then come handshakes
AT_ONCE: Final = 16  # look-ups that may wait; a name server that is asked anew after an outage answers the new question
NAMED: Final = re.compile(r"tcp://(?P<host>[A-Za-z0-9._-]+):(?P<port>\d+)")


class Names:
    """The addresses behind a url, one after the other.

    Args:
        url: the broker's.
        found: called in the event loop with tcp://number:port, whenever it is another one than before.
        unknown: called with the reason when it has none, and with "" when it has one again.
    """

    def __init__(
        self, url: str, found: Callable[[str], None], unknown: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._match = NAMED.fullmatch(url)
        self.needed = self._match is not None and not _is_number(self._match["host"])
        self._found = found
        self._unknown = unknown
        self._asked = 0  # questions since the address was taken
        self._address = ""
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Looks now and each second until `stop`; nothing where the url has no name."""
        if self.needed and self._timer is None:
            self._loop = asyncio.get_running_loop()
            self._asked = 0
            self._look()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = self._loop.call_later(AGAIN, self._look)
        self._asked += 1
        if self._waiting < AT_ONCE:
            self._waiting += 1
            # a thread of its own: those of a pool would hold up the end of the process
            threading.Thread(target=self._ask, name="ralmq-name", daemon=True).start()

    def _ask(self) -> None:
        assert self._match is not None
        addresses: list[str] = []
        reason = ""
        try:
            lines = socket.getaddrinfo(self._match["host"], None, socket.AF_INET, socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(line[4][0]) for line in lines))
        except (OSError, UnicodeError) as error:  # not known, for now
            reason = getattr(error, "strerror", "") or str(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._answered, addresses, reason)

    def _answered(self, addresses: list[str], reason: str) -> None:
        self._waiting -= 1
        if self._timer is None:
            return
        self._unknown(reason)
        if not addresses or (self._address in addresses and self._asked <= EACH):
            return
        known = addresses.index(self._address) if self._address in addresses else -1
        address = addresses[(known + 1) % len(addresses)]  # the next one: nobody answers at this
        self._asked = 1  # also where it is the only one
        if address != self._address:
            self._address = address
            assert self._match is not None
            self._found(f"tcp://{address}:{self._match['port']}")


def _is_number(host: str) -> bool:
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True
