"""From the address that a broker has bound to one that can be connected to. Knows addresses; sends nothing."""

import ipaddress
import socket

EVERYWHERE = ("0.0.0.0", "[::]", "*")  # what binds every interface
PROBE = ("192.0.2.1", 9)  # of a network for documentation: a way there is looked up, and no packet is sent


def from_here(bound: str) -> str:
    """For processes of the same machine."""
    host, port = _parts(bound)
    return f"tcp://127.0.0.1:{port}" if host in EVERYWHERE else bound


def from_elsewhere(bound: str) -> str:
    """For other machines: where every interface is bound, that of the way out, or else the host's name."""
    host, port = _parts(bound)
    if host not in EVERYWHERE:
        return bound
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(PROBE)
            return f"tcp://{probe.getsockname()[0]}:{port}"
        except OSError:
            return f"tcp://{socket.gethostname()}:{port}"


def is_here(address: str) -> bool:
    """Whether a numeric address is one of this machine; False for names."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except (ValueError, OSError):
        return False
    return True


def _parts(bound: str) -> tuple[str, str]:
    host, _, port = bound.removeprefix("tcp://").rpartition(":")
    return (host, port) if bound.startswith("tcp://") else ("", "")
