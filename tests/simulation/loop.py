"""What coroutines of the client and the workers need of an event loop, on simulated time. Knows no socket.

Each simulated process has one, so that the real client, host and generator run unchanged.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulation.network import Network, Node


ROUNDS = 3  # some tasks wait for others once more when they are cancelled


class Timer:
    """A call that is due later, unless it is cancelled."""

    __slots__ = ("_args", "_call", "cancelled_at", "loop", "when")

    def __init__(self, loop: "Loop", when: float, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.loop = loop
        self.when = when
        self._call: Callable[..., Any] | None = call
        self._args = args

    def cancel(self) -> None:
        self._call, self._args = None, ()

    def cancelled(self) -> bool:
        return self._call is None

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            self.loop.call(call, *self._args)


class Loop:
    """An event loop without sockets and threads.

    Args:
        world: whose time it is, and who counts.
        node: whose process it is: nothing runs while that is stopped, nor after its death.
    """

    def __init__(self, world: "Network", node: "Node") -> None:
        self._world = world
        self._node = node
        self._ready: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self.over = False

    def call(self, call: Callable[..., Any], *args: Any) -> None:
        """Runs a call and all that follows from it at once."""
        if self.over:
            return
        ready = self._ready
        if self._world.running is not self:
            self._world.running = self
            asyncio._set_running_loop(self)  # type: ignore[arg-type]
        call(*args)
        while ready:
            call, args = ready.popleft()
            call(*args)

    def end(self) -> None:
        """The process is dead: its coroutines end here. What they still say is heard by nobody."""
        for _ in range(ROUNDS):
            tasks = [task for task in self._tasks if not task.done()]
            for task in tasks:
                self.call(task.cancel)
        self.over = True
        self._ready.clear()

    # -- as asyncio names it

    def time(self) -> float:
        return self._world.now

    def call_soon(self, call: Callable[..., Any], *args: Any, context: Any = None) -> Timer:
        timer = Timer(self, self._world.now, call, args)
        self._ready.append((call, args))
        return timer

    def call_later(self, delay: float, call: Callable[..., Any], *args: Any, context: Any = None) -> Timer:
        return self.call_at(self._world.now + delay, call, *args)

    def call_at(self, when: float, call: Callable[..., Any], *args: Any, context: Any = None) -> Timer:
        timer = Timer(self, when, call, args)
        if not self.over:
            self._world.timer(self._node, when, timer)
        return timer

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(
        self, work: Coroutine[Any, Any, Any], *, name: str | None = None, context: Any = None
    ) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.Task(work, loop=self, name=name or "task")  # type: ignore[arg-type]
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.over

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Tasks that a dead process leaves behind say nothing; an exception that nobody took is a fault."""
        if not self.over and context.get("exception") is not None:
            self._world.crashes.append(context["exception"])
