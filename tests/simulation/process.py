"""Processes that run the product's own link, client and host over a simulated connection. Knows no socket."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

from ralmq.client import link as link_module
from ralmq.client.client import Client
from ralmq.client.link import Link
from ralmq.client.stream import Stream
from ralmq.schema.frame import PREFIX, read_prefix
from ralmq.schema.limits import NO_ID
from ralmq.schema.message import Kind
from ralmq.workers.base import Worker
from ralmq.workers.host import Host
from simulation.loop import Loop
from simulation.wire import Frames, kind_of
from simulation.world import World

WINDOW = 4  # parts that may be under way: so few that credit matters in short texts


class Process:
    """A process: an event loop, and one connection of it."""

    real = True

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.left = False
        self.link: Link | None = None
        self.wire: Wire | None = None
        self.hangs = False
        self.broken = ""
        self.loop = Loop(world, self)
        world.join(self)

    @property
    def known(self) -> bool:
        return self.link is not None and self.link._known

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begins a coroutine of the process now."""
        self.loop.call(self._start, work)

    def receive(self, frames: Frames) -> None:
        if self.wire is not None:
            self.loop.call(self.wire.take, frames)

    def cut(self) -> None:
        """The connection has ended, as libzmq tells."""
        if self.wire is not None:
            self.loop.call(self.wire.lost)

    def end(self) -> None:
        self.loop.end()

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(work)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.world.over:
            self.world.crashes.append(error)


class Wire:
    """What the link takes for its DEALER."""

    def __init__(self, url: str, take: Callable[[Frames], None], cut: Callable[[], None], *_: Any, **__: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self.process: Any = loop._node
        self.world: World = loop._world
        self.take, self.lost = take, cut
        self.process.wire = self

    @property
    def blocked(self) -> bool:
        port = self.world.ports.get(self.process)
        return port is not None and bool(port.backlog)

    def send(self, frames: Frames) -> None:
        process, world = self.process, self.world
        if not process.broken or kind_of(frames) != Kind.PARTIAL:
            world.send(process, frames)
            return
        head = frames[0]
        if process.broken == "foreign" and (other := world.foreign(process)) is not None:
            prefix = read_prefix(head)._replace(id=other[0], attempt=other[1])
            world.send(process, [prefix.pack() + head[PREFIX.size :], *frames[1:]])
        if process.broken != "missing" or world.rng.random() < 0.7:
            world.send(process, frames)
        if process.broken == "doubled":
            world.send(process, frames)

    def forget(self) -> None:
        port = self.world.ports.get(self.process)
        if port is not None:
            port.backlog.clear()

    def close(self) -> None:
        self.process.wire = None
        self.process.left = True
        self.world.leave(self.process)


class Asker(Client):
    """The real client, with small windows."""

    def stream(self, *args: Any, **options: Any) -> Stream:
        return super().stream(*args, **{"window": WINDOW, **options})


class Server(Process):
    """A process that runs a worker on the real host."""

    def __init__(self, world: World, name: str, worker: Worker) -> None:
        super().__init__(world, name)
        self.worker = worker
        self.host = Host(worker, "sim://", name=name)
        self.start(self._open())

    async def _open(self) -> None:
        opening = asyncio.ensure_future(self.host.open(float("inf")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.link = self.host.link
        self.host.client = Asker(self.host.link, float("inf"))
        await opening

    def drain(self) -> None:
        """As after SIGTERM."""
        self.start(self.host.drain(20.0))

    def send(self, message: Any, id: bytes = NO_ID, attempt: int = 0) -> None:
        """A message beside those of its worker."""
        if self.link is not None:
            self.loop.call(lambda: self.link.send(message, id=id, attempt=attempt))  # type: ignore[union-attr]

    @property
    def epoch(self) -> int:
        return self.link.epoch if self.link is not None else 0

    @epoch.setter
    def epoch(self, value: int) -> None:
        if self.link is not None:
            self.link.epoch = value

    @property
    def in_hand(self) -> tuple[int, int]:
        """Requests that it serves, and that it asked."""
        return len(self.host._jobs), len(self.link._asked) if self.link is not None else 0


class _Crashes(logging.Handler):
    """An error that the product's code logs with a traceback is a fault of it."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self.world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and not self.world.over:
            self.world.crashes.append(record.exc_info[1])


@contextlib.contextmanager
def installed(world: World, seed: int) -> Iterator[None]:
    """Within it links get simulated connections, ids that follow from the seed, and the codec of the run."""
    names = ("Wire", "os", "encode", "decode", "key_for")
    before = {name: getattr(link_module, name) for name in names}
    state = random.getstate()
    random.seed(f"waits {seed}")
    drawn = random.Random(f"ids {seed}")
    chance = SimpleNamespace(urandom=drawn.randbytes, getpid=lambda: 1)
    codec = (world.wire.encode, world.wire.decode)
    for name, value in zip(names, (Wire, chance, *codec, lambda *_, **__: None), strict=True):
        setattr(link_module, name, value)
    logger = logging.getLogger("ralmq")
    handler, propagate, level = _Crashes(world), logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        world.stop_all()
        asyncio._set_running_loop(None)
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
        random.setstate(state)
        for name, value in before.items():
            setattr(link_module, name, value)
