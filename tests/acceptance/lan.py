"""Hosts on one machine: network namespaces on a bridge, each link 100 Mbit/s. Needs root, `ip` and `tc`."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RATE = ("tbf", "rate", "100mbit", "burst", "64kb", "latency", "200ms")
NET = "10.77.0"


def missing() -> str:
    """What this machine lacks for it; "" for nothing."""
    if os.geteuid():
        return "root"
    return ", ".join(tool for tool in ("ip", "tc") if shutil.which(tool) is None)


class Host:
    """A namespace with one interface, eth0."""

    def __init__(self, name: str, number: int, lan: str) -> None:
        self.name, self.address = f"{lan}-{name}", f"{NET}.{number}"
        self._lan, self._port = lan, f"to-{name}"
        _run("ip", "netns", "add", self.name)
        _run("ip", "-n", lan, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "-n", lan, "link", "set", self._port, "master", "bridge", "up")
        _run("ip", "-n", lan, "link", "set", self._port, "up")
        _run("tc", "-n", lan, "qdisc", "add", "dev", self._port, "root", *RATE)
        for command in (
            ("addr", "add", f"{self.address}/24", "dev", "eth0"),
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
        ):
            _run("ip", "-n", self.name, *command)
        _run("tc", "-n", self.name, "qdisc", "add", "dev", "eth0", "root", *RATE)

    def wrapped(self, *command: str) -> list[str]:
        """The command, to be run on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut(self) -> None:
        _run("ip", "-n", self._lan, "link", "set", self._port, "down")

    def heal(self) -> None:
        _run("ip", "-n", self._lan, "link", "set", self._port, "up")

    def sent(self) -> tuple[int, int]:
        """Bytes and packets that left this host so far."""
        counters = Path("/sys/class/net/eth0/statistics")
        text = subprocess.run(
            self.wrapped("cat", str(counters / "tx_bytes"), str(counters / "tx_packets")),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        return int(text[0]), int(text[1])


@contextmanager
def lan(*names: str) -> Iterator[list[Host]]:
    """Hosts with addresses 10.77.0.1, 2, ... on one bridge; all is gone at the end."""
    name = f"rq{os.getpid() % 100_000}"
    _run("ip", "netns", "add", name)
    hosts: list[Host] = []
    try:
        _run("ip", "-n", name, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", name, "link", "set", "bridge", "up")
        for number, host in enumerate(names, 1):
            hosts.append(Host(host, number, name))
        yield hosts
    finally:
        for host_ in [*[host.name for host in hosts], name]:
            subprocess.run(["ip", "netns", "del", host_], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
