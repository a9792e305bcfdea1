"""Where a peer is: the host and the namespaces it lives in, and the address that others reach it by. Opens no port."""

import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ...schema.errors import Refused

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_SPACES: Final = ("net", "pid")  # abstract sockets belong to the one, /proc to the other
_PROBE: Final = 9  # any port: nothing is sent


def here() -> str:
    """Equal for processes that may share memory and a local socket: one kernel, namespaces and user."""
    try:
        spaces = [os.readlink(f"/proc/self/ns/{space}") for space in _SPACES]
        return f"{_BOOT.read_text().strip()}/{'/'.join(spaces)}/{os.getuid()}"
    except OSError:  # no Linux: nobody else is here
        return f"{socket.gethostname()}/{os.getpid()}"


def is_local(url: str) -> bool:
    """Whether only processes of this machine can reach a broker at `url`."""
    host = urlsplit(url).hostname or ""
    return not url.startswith("tcp://") or host in ("localhost", "::1") or host.startswith("127.")


def known(address: str) -> str:
    """An address that a user gave, as it stands in a url.

    Raises:
        Refused: one that stands for all of a machine's addresses, by which nobody can reach it.
    """
    if address.strip("[]") in ("*", "0.0.0.0", "::"):
        raise Refused(f"address={address} is every address of this machine: give the one by which the others reach it")
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def towards(url: str) -> str:
    """This machine's own address on the interface that leads to tcp://host:port.

    Raises:
        Refused: the host has no address, or no interface leads there.
    """
    parts = urlsplit(url)
    try:
        found = socket.getaddrinfo(parts.hostname, _PROBE, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # a datagram socket sends nothing by it, but is given its interface
            own: str = probe.getsockname()[0]
    except OSError as error:
        raise Refused(f"no interface leads to {url} ({error.strerror or error}): give -o address=IP") from None
    return f"[{own}]" if ":" in own else own
