"""`ralmq broker` and `ralmq worker`: one process that serves until it is told to stop. Knows addresses, no messages."""

import asyncio
import ipaddress
import logging
import os
import signal
import sys
from typing import Annotated

import typer

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import Refused
from .failures import DEBUG
from .shared import Broker

Insecure = Annotated[
    bool, typer.Option("--insecure", help="Accept an address that others can reach: nothing is encrypted.")
]


def broker(
    bind: Annotated[str, typer.Option("--bind", metavar="URL", help="tcp://host:port or ipc://path.")] = DEFAULT_BROKER,
    insecure: Insecure = False,
) -> None:
    """Run a broker until SIGTERM or Ctrl-C."""
    check_bind(bind, insecure=insecure)
    asyncio.run(_serve(bind))


def worker(
    kind: Annotated[str, typer.Argument(metavar="NAME", help="echo, stage, index, generator, or module:Class.")],
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", metavar="KEY=VALUE", help="An option of the worker class.")
    ] = None,
    broker: Broker = DEFAULT_BROKER,
    name: Annotated[str, typer.Option("--name", help="Shown in `ralmq status`, with a suffix.")] = "",
) -> None:
    """Run a worker until SIGTERM or Ctrl-C; it waits for the broker for as long as it takes."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("ralmq").setLevel(logging.DEBUG if os.environ.get(DEBUG) else logging.INFO)
    from ..workers.options import build
    from ..workers.process import run
    from ..workers.registry import find

    run(build(find(kind), option or []), broker, name=name)


def check_bind(bind: str, *, insecure: bool) -> None:
    """Refuses an address that other machines may reach.

    Raises:
        Refused: it is no address, or neither loopback nor ipc and `insecure` is not set.
    """
    if insecure or bind.startswith("ipc://"):
        return
    host, colon, _ = bind.removeprefix("tcp://").rpartition(":")
    if not bind.startswith("tcp://") or not colon:
        raise Refused(f"{bind} is no address that a broker binds: give tcp://host:port or ipc://path")
    host = host.strip("[]")
    if host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:  # a name or `*`: who reaches it is not known here
        pass
    raise Refused(f"{bind} is open to other machines, and nothing is encrypted: bind 127.0.0.1, or add --insecure")


async def _serve(bind: str) -> None:
    from ..broker.server import Server
    from ..workers.process import PARENT_PIPE, watch_parent

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if os.environ.get(PARENT_PIPE):
        watch_parent(int(os.environ[PARENT_PIPE]), lambda: loop.call_soon_threadsafe(stop.set))
    async with Server(bind) as server:
        print(f"broker at {server.endpoint}", file=sys.stderr, flush=True)
        await stop.wait()
