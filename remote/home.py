"""The caller's side of a broker: a thread with an event loop, a client in it, a door, and a peer for each worker.

Programs that train are synchronous: they hand calls to this thread and wait for answers, always with a deadline.
"""

import asyncio
import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any, Final

from ..client.client import Client
from ..client.client import connect as connected
from ..schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ..schema.errors import ConnectionClosed, DeadlineExceeded, RalmqError, WorkerLost
from .peer import CLOSED, Peer
from .straight import ENDED, Straight

DEADLINE: Final = 300.0  # seconds for any one wait
OPENING: Final = 30.0  # seconds for a session
MOMENT: Final = 3e-4  # seconds that a call waits for one that may follow it
_homes: dict[str, "Home"] = {}
_lock: Final = threading.RLock()
_default: list[str] = []


class Home:
    """One broker, as this process sees it. Made by `home`.

    Attributes:
        deadline: seconds that a caller waits for any one thing.
        received: bytes of tensors that came to this process.
        messages: answers that came to it.
    """

    def __init__(self, url: str, *, wait: float, deadline: float, keys: Any = None) -> None:
        self.url = url
        self.deadline = deadline
        self.received = 0
        self.messages = 0
        self.closed = False
        self._peers: dict[str, Peer] = {}
        self._lock = threading.Lock()
        self._todo: deque[tuple[Peer, Callable[[], None]]] = deque()
        self._scheduled = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ralmq-remote", daemon=True)
        self._thread.start()
        try:
            self.run(self._open(wait, keys), wait + 10)
        except BaseException:
            self._end()
            raise

    client: Client
    straight: Straight

    def peer(self, worker: str) -> Peer:
        """The session with a worker; opened where there is none, or where the last one is lost.

        Raises:
            NoService: no worker has that name.
            RalmqError: it cannot be reached.
        """
        with self._lock:
            if self.closed:
                raise ConnectionClosed(CLOSED)
            found = self._peers.get(worker)
            if found is None or found.error is not None:
                found = Peer(self, worker)
                self.run(found.open(OPENING), OPENING + 5)
                self._peers[worker] = found
            return found

    def soon(self, peer: Peer, action: Callable[[], None]) -> None:
        """Runs `action`, which sends to a peer, after what was handed over before.

        A call to a worker that has nothing to do waits a moment for the next one, which mostly asks for its result, and
        both leave in one message. A worker that has something to do gets what follows from the loop, which is woken
        once for many and sends them together.
        """
        waiting, busy = bool(self._todo), peer.under_way
        if waiting and busy == 0 and self.now((peer, action)):
            return
        self._todo.append((peer, action))
        try:
            if busy == 0 and not waiting:
                self.loop.call_soon_threadsafe(self.loop.call_later, MOMENT, self._drain)
            elif not self._scheduled:
                self._scheduled = True
                # a turn later: more may follow at once
                self.loop.call_soon_threadsafe(self.loop.call_soon, self._drain)
        except RuntimeError:
            raise ConnectionClosed(CLOSED) from None

    def now(self, *more: tuple[Peer, Callable[[], None]]) -> bool:
        """Sends what was handed over, and this, in this thread; False, and nothing is sent, where it takes the loop."""
        with self.straight.together():
            if any(peer.under_way is None for peer, _ in (*self._todo, *more)):
                return False
            self._todo.extend(more)
            self._send()
            return True

    def run(self, coroutine: Any, within: float) -> Any:
        """A coroutine's result, from another thread.

        Raises:
            DeadlineExceeded: it did not end in time.
        """
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(within)
        except Late:
            future.cancel()
            raise DeadlineExceeded(f"no answer within {within:g} s: see `ralmq status`") from None

    def close(self) -> None:
        """Leaves the broker: workers free all that this process had there."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
        with contextlib.suppress(RalmqError):
            self.run(self._leave(), 10)
        self._end()

    # -- inside

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def _end(self) -> None:
        self.closed = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)

    def _drain(self) -> None:
        self._scheduled = False
        with self.straight.together():
            self._send()

    def _send(self) -> None:
        while self._todo:
            self._todo.popleft()[1]()

    async def _open(self, wait: float, keys: Any) -> None:
        client = connected(self.url, wait=wait, name="caller", keys=keys)
        await client.__aenter__()
        self.client = client
        self.straight = Straight(lost=self._gone)

    def _gone(self, near: str) -> None:
        for peer in list(self._peers.values()):  # another thread may add one
            if peer.near == near:
                peer.lose(WorkerLost(f"the worker {peer.name} {ENDED}: copy its modules to it again"))

    async def _leave(self) -> None:
        for peer in list(self._peers.values()):
            await peer.leave()
        self.straight.close()
        await self.client.__aexit__(None, None, None)
        await asyncio.sleep(0.05)  # the BYE leaves


def home(url: str | None = None) -> Home:
    """The connection to a broker: of `connect`, else of $RALMQ_BROKER, else tcp://127.0.0.1:5555.

    Raises:
        NoBroker: nobody answers there.
    """
    with _lock:
        url = url or (_default[0] if _default else os.environ.get(BROKER_VARIABLE) or DEFAULT_BROKER)
        found = _homes.get(url)
        return connect(url, default=False) if found is None or found.closed else found


def connect(url: str, *, wait: float = 5.0, deadline: float = DEADLINE, keys: Any = None, default: bool = True) -> Home:
    """Connects to a broker, for all that follows.

    Args:
        wait: seconds to wait for the broker.
        deadline: seconds to wait for any one answer of a worker.
        keys: as in ralmq.connect.
        default: calls that name no broker mean this one from now on.
    """
    with _lock:
        found = _homes.get(url)
        if found is None or found.closed:
            found = _homes[url] = Home(url, wait=wait, deadline=deadline, keys=keys)
        elif default:
            found.deadline = deadline
        if default:
            _default[:] = [url]
        return found


def close() -> None:
    """Closes all connections; workers free what this process had there."""
    with _lock:
        for found in _homes.values():
            found.close()
        _homes.clear()
        _default.clear()


atexit.register(close)
