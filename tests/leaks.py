"""Runs `async def` tests, each in an event loop of its own, and fails those that leave anything open behind them.

A folder of tests takes part by `from leaks import pytest_pyfunc_call, warm` in its conftest.
"""

import asyncio
import gc
import inspect
import os
import time
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest
import zmq

CLOSING = 15.0  # seconds that libzmq may take to close what was closed


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Opens what stays open for the life of the process: the shared context, and pyzmq's collector of sent buffers."""
    context: zmq.Context[Any] = zmq.Context.instance()
    with context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://warm")
        other.connect("inproc://warm")
        one.send(bytes(1 << 20), copy=False)
        other.recv()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    before = descriptors()
    asyncio.run(watched(pyfuncitem.obj(**arguments)))
    settle(lambda: not open_sockets(), lambda: f"sockets left open: {open_sockets()}")
    settle(lambda: descriptors() <= before, lambda: f"descriptors left open: {sorted(descriptors() - before)}")
    return True


async def watched(test: Coroutine[Any, Any, None]) -> None:
    """Runs a test; fails where it leaves tasks, or where a callback or a task failed with nobody to tell."""
    complaints: list[str] = []
    loop = asyncio.get_running_loop()

    def complain(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        complaints.append(f"{context['message']}: {context.get('exception')!r}")

    loop.set_exception_handler(complain)
    await test
    for _ in range(100):  # what has just been cancelled ends within a few turns
        if len(asyncio.all_tasks()) == 1:
            break
        await asyncio.sleep(0.01)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
    gc.collect()  # a task that failed unseen complains when it is collected
    await asyncio.sleep(0)
    assert not complaints, sorted(set(complaints))[:5]


def descriptors() -> set[str]:
    """Open file descriptors of this process, with what they are."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the one that listed them
            continue
    return {entry for entry in found if "/proc/" not in entry}


_SOCKETS: "weakref.WeakSet[Any]" = weakref.WeakSet()
_made = zmq.Socket.__init__


def _noted(self: Any, *given: Any, **options: Any) -> None:
    _SOCKETS.add(self)
    _made(self, *given, **options)


zmq.Socket.__init__ = _noted  # type: ignore[method-assign]


def open_sockets() -> list[Any]:
    """Sockets of pyzmq that nobody has closed, those of its own collector aside."""
    if not any(not socket.closed for socket in _SOCKETS):
        return []
    gc.collect()
    found = [socket for socket in _SOCKETS if not socket.closed]
    return [socket for socket in found if b"pyzmq.gc" not in bytes(socket.get(zmq.LAST_ENDPOINT))]


def settle(condition: Any, complaint: Any) -> None:
    end = time.monotonic() + CLOSING
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(0.02)
