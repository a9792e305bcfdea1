"""A worker as a process of its own: signals, drain, exit. Knows no worker class."""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

from .base import Worker
from .host import Host

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0  # seconds of starting, after which a user is told what is waited for
END: Final = 5.0  # seconds that threads have after the drain; the interpreter would wait for one that hangs for ever
PARENT_PIPE = "RALMQ_PARENT_PIPE"  # environment: number of the descriptor whose end of file means: the parent is gone


def run(worker: Worker, url: str, *, name: str = "", wait: float = float("inf")) -> None:
    """Serves until SIGTERM or SIGINT, then drains: requests in hand are finished, no new ones are taken.

    A second signal ends the process at once. With this call the process ends, also where one of its threads hangs.

    Raises:
        RalmqError: the worker or its link cannot start, or it can serve no more.
    """
    asyncio.run(_run(worker, url, name, wait))


async def _run(worker: Worker, url: str, name: str, wait: float) -> None:
    try:
        await _served(worker, url, name, wait)
    finally:
        _end()


async def _served(worker: Worker, url: str, name: str, wait: float) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        stop.set()

    host = Host(worker, url, name=name, asked_to_leave=stop.set, failed=failed)

    def stopped() -> None:
        stop.set()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    for number in SIGNALS:
        loop.add_signal_handler(number, stopped)
    if os.environ.get(PARENT_PIPE):
        watch_parent(int(os.environ[PARENT_PIPE]), lambda: loop.call_soon_threadsafe(stop.set))
    opening = loop.create_task(host.open(wait))
    stopping = loop.create_task(stop.wait())
    hint = loop.call_later(PATIENCE, _say, f"{host.kind} still loads, or waits for the broker at {url}")
    await asyncio.wait([opening, stopping], return_when=asyncio.FIRST_COMPLETED)
    hint.cancel()
    if not opening.done():
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
        return
    await opening
    serves = ", ".join(worker.services) or "a span"
    _say(f"{host.link.hello.name} serves {serves} at {url}")
    await stopping
    await host.drain()
    if failures:
        raise failures[0]


def _end() -> None:
    """A thread that hangs, in a driver for example, keeps neither the event loop nor the interpreter from ending."""

    def ended() -> None:
        _say("a thread of this worker hangs: the process ends without it")
        os._exit(1)

    timer = threading.Timer(END, ended)
    timer.daemon = True
    timer.start()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def watch_parent(descriptor: int, gone: Callable[[], object]) -> None:
    """Calls `gone` when the other end of a pipe is closed: the process that spawned this one is no more."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1):
                pass
        gone()

    threading.Thread(target=wait, name="parent-pipe", daemon=True).start()
