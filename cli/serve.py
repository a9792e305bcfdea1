"""`ralmq broker` and `ralmq worker`: one process that serves until it is told to stop. Knows addresses, no messages."""

import asyncio
import ipaddress
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..schema.address import DEFAULT_BROKER
from ..schema.errors import Refused
from ..schema.keys import key_for
from .failures import DEBUG
from .shared import LAST_PORT, Broker, Keys

if TYPE_CHECKING:
    from ..broker.server import Server

log = logging.getLogger("ralmq.broker")
EACH: Final = 60.0  # seconds between two warnings
REFUSALS: Final = ("unknown_key", "no_handshake", "unauthorized", "endless", "flooding")  # counts
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Accept an address that others can reach: nothing is encrypted.")
]


def broker(
    bind: Annotated[str, typer.Option("--bind", metavar="URL", help="tcp://host:port or ipc://path.")] = DEFAULT_BROKER,
    insecure: Insecure = False,
    keys: Keys = None,
) -> None:
    """Run a broker until SIGTERM or Ctrl-C."""
    check_bind(bind, insecure=insecure, keys=keys)
    _log()
    folder = Path(keys).expanduser() if keys and bind.startswith("tcp://") else None
    asyncio.run(_serve(bind, folder, exposed=folder is None and not _private(bind)))


def worker(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="echo, stage, index, generator, encoder, t5-encoder, ralm-gateway, module, or package.module:Class.",
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o", "--option", metavar="KEY=VALUE", help="An option of the worker: see `ralmq worker NAME --help`."
        ),
    ] = None,
    broker: Broker = DEFAULT_BROKER,
    name: Annotated[str, typer.Option("--name", help="Shown in `ralmq status`, with a suffix.")] = "",
    keys: Keys = None,
) -> None:
    """Run a worker until SIGTERM or Ctrl-C; it waits for the broker for as long as it takes."""
    _log()
    key_for(broker, keys, works=True)  # a fault in them is told before the worker loads anything
    from ..workers.options import build
    from ..workers.process import run
    from ..workers.registry import find

    found = find(kind)
    given = [pair.partition("=")[0] for pair in option or ()]
    for place, pair in enumerate(option or ()):
        if given[place] in given[:place]:
            raise Refused(f"-o {given[place]} is given twice: give it once; several values have commas between them")
        if not pair.partition("=")[0].isidentifier() or "=" not in pair:
            raise Refused(
                f"-o {pair} is no key=value: write one of the options that `ralmq worker {kind} --help` lists"
            )
    run(build(found, option or []), broker, name=name)


def check_bind(bind: str, *, insecure: bool, keys: str | None) -> None:
    """Refuses an address that other machines may reach, where they need no key.

    Raises:
        Refused: it is no address, or neither loopback nor ipc, and there are no keys and `insecure` is not set.
    """
    if not insecure and not _private(bind) and not keys:
        raise Refused(
            f"{bind} is open to other machines: make keys with `ralmq keys init DIR` and give --keys DIR; "
            "or, where all who reach it may do everything, add --insecure"
        )


def _private(bind: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        Refused: it is none.
    """
    if bind.startswith("ipc://"):
        return True
    host, colon, port = bind.removeprefix("tcp://").rpartition(":")
    known = port == "*" or (port.isdecimal() and int(port) <= LAST_PORT)  # libzmq takes others modulo 65536
    if not bind.startswith("tcp://") or not colon or not host or not known:
        raise Refused(f"{bind} is no address that a broker binds: give tcp://host:port or ipc://path")
    host = host.strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name or `*`: who reaches it is not known here
        return False


class Places(logging.Formatter):
    """Of an exception its type and places alone: what it says may hold what a user sent."""

    def formatException(self, ei: Any) -> str:
        kind, _, trace = ei
        return "".join([*traceback.format_tb(trace), kind.__name__])


def _log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(Places("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("ralmq").setLevel(logging.DEBUG if os.environ.get(DEBUG) else logging.INFO)


async def _serve(bind: str, keys: Path | None, *, exposed: bool) -> None:
    from ..broker.server import Server
    from ..workers.process import PARENT_PIPE, watch_parent

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if os.environ.get(PARENT_PIPE):
        watch_parent(int(os.environ[PARENT_PIPE]), lambda: loop.call_soon_threadsafe(stop.set))
    async with Server(bind, keys=keys) as server:
        print(f"broker at {server.endpoint}", file=sys.stderr, flush=True)
        warning = loop.create_task(_warn(server, exposed))
        try:
            await stop.wait()
        finally:
            warning.cancel()


async def _warn(server: "Server", exposed: bool) -> None:
    """Says each minute that anybody gets in, and how many were kept out."""
    before = 0
    while True:
        if exposed:
            log.warning("--insecure: whoever reaches %s may do everything; see `ralmq keys init`", server.endpoint)
        await asyncio.sleep(EACH)
        counts = server.core.requests.counts
        refused = sum(counts[what] for what in REFUSALS)
        if refused > before:
            log.warning(
                "%d connections were kept out in the last minute: see the counts of `ralmq status --json`",
                refused - before,
            )
        before = refused
