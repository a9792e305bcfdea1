"""One caller's session: its calls in the order in which it made them, whatever way they come. Knows no link.

A call's values of other workers are asked for as soon as it arrives, and it waits for them at its turn.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final

import torch

from ...schema.errors import Malformed, RalmqError, Refused, WorkerLost
from ...schema.tensor import Tensor
from ..failures import told
from ..operators import SIZED
from ..values import Ref, leaves, opened, refs_in
from .call import Call
from .compute import Answer
from .table import Failed, Node, Table

QUICK: Final = 2e-4  # seconds: a call that takes less runs in the event loop
TURN: Final = 1e-3  # seconds of those in one turn of it
KINDS: Final = 4096  # of calls, whose times are kept
Pulled = tuple[dict[str, Any], Sequence[Tensor]] | Exception
Pull = Callable[[Ref, Callable[[Pulled], None]], None]
Reply = Callable[[Answer], None]
Waiting = tuple[Call, Reply]


class Session:
    """What a worker has of one caller.

    Args:
        verbs: what a call may ask.
        pull: asks another worker for a value, and calls back with it.
        compute: one thread, in which every call runs.
    """

    def __init__(
        self, verbs: Mapping[str, Callable[[Call], Answer]], pull: Pull, compute: Executor, device: torch.device
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._verbs = verbs
        self._pull = pull
        self._compute = compute
        self._device = device
        self._next = 1
        self._early: dict[int, Waiting] = {}
        self._queue: deque[Waiting] = deque()
        self._ready: deque[tuple[Call, Reply]] = deque()  # for the compute thread
        self._ended: deque[tuple[Reply, Answer]] = deque()  # from it
        self._took: dict[Hashable, float] = {}  # seconds, of the last call of a kind
        self._busy = False
        self._waking = False
        self._closed = False
        self.table = Table(self._loop)

    def arrive(self, body: dict[str, Any], tensors: Sequence[Tensor], reply: Reply) -> None:
        """Takes a call; `reply` is called with its answer, in the event loop."""
        number = body.get("n")
        if self._closed or type(number) is not int or number < self._next or number in self._early:
            lost = WorkerLost("this call was begun before, and its answer is lost")
            reply(({"error": told(Refused("a call without its number") if type(number) is not int else lost)}, []))
            return
        call = Call(body, tensors, self.table, self._device)
        self._early[number] = (call, reply)
        self._ask(call)
        while self._next in self._early:
            self._queue.append(self._early.pop(self._next))
            self._next += 1
        self._pump()

    def close(self) -> None:
        """Frees all that the caller had, once what runs has ended."""
        self._closed = True
        self._queue.clear()
        self._ready.clear()
        self._early.clear()
        with contextlib.suppress(RuntimeError):  # the thread has ended
            self._compute.submit(self.table.close)

    # -- inside

    def _ask(self, call: Call) -> None:
        try:
            wanted = {(ref.session, ref.number): ref for ref in refs_in(call.body.get("a")) if ref.service}
        except (Malformed, RecursionError):
            wanted = {}  # said at its turn
        call.missing = len(wanted)
        for key, ref in wanted.items():
            self._pull(ref, partial(self._came, call, key))

    def _came(self, call: Call, key: tuple[bytes, int], found: Pulled) -> None:
        """A value of another worker, or why there is none: that is raised where it is used."""
        if key in call.pulled:
            return
        try:
            call.pulled[key] = found if isinstance(found, Exception) else opened(*found, grad=True)
        except Exception as error:
            call.pulled[key] = error
        call.missing -= 1
        if not call.missing:
            self._pump()

    def _pump(self) -> None:
        until = time.perf_counter() + TURN
        while self._queue and not self._closed and not self._queue[0][0].missing:
            call, reply = self._queue.popleft()
            if not self._busy and not self._ready and self._quick(call) and time.perf_counter() < until:
                reply(self._run(call))
            else:
                self._ready.append((call, reply))
        if self._ready and not self._busy:
            self._busy = True
            self._compute.submit(self._work)

    def _quick(self, call: Call) -> bool:
        """Whether such a call took less time, as far as is known, than the way to the compute thread and back does."""
        if self._device.type != "cpu":
            return False
        call.kind = self._kind(call)
        return call.kind is not None and self._took.get(call.kind, QUICK) < QUICK

    def _kind(self, call: Call) -> Hashable:
        """Of one module, operator or way back, with as many bytes of arguments; None: nothing is known of it."""
        body = call.body
        try:
            if body.get("v") == "back":
                node = self.table.nodes.get(body["node"])
                return ("back", node.kind) if isinstance(node, Node) and node.kind else None
            if body.get("op") in SIZED:
                return None
            about = leaves(self.table.peek(body.get("of", 0)))  # else it is an optimizer, and one is not like another
            own = [self.table.peek(ref.number) for ref in refs_in(body.get("a")) if not ref.service]
            values = [*about, *leaves([own, list(call.pulled.values())])]
            size = sum(tensor.nbytes for tensor in call.tensors) + sum(leaf.nbytes for leaf in values)
            named = [str(body.get(name)) for name in ("v", "module", "op")]
            return (*named, None if about else body.get("of"), size.bit_length())
        except Exception:  # said at its turn
            return None

    def _work(self) -> None:  # in the compute thread
        """Runs what is ready, without a way to the loop and back for each call."""
        while True:
            try:
                call, reply = self._ready.popleft()
            except IndexError:
                break
            self._ended.append((reply, self._run(call)))
            if not self._waking:
                self._waking = True
                self._wake()
        self._busy = False
        if self._ready and not self._closed:  # it came between the two lines
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._loop.call_soon, self._tell)  # a turn later: more may end at once

    def _tell(self) -> None:
        self._waking = False
        while self._ended:
            reply, answer = self._ended.popleft()
            reply(answer)
        self._pump()

    def _run(self, call: Call) -> Answer:
        begun = time.perf_counter()
        try:
            return self._answered(call)
        finally:
            if len(self._took) > KINDS:
                self._took.clear()
            if call.kind is not None:
                self._took[call.kind] = time.perf_counter() - begun

    def _answered(self, call: Call) -> Answer:
        try:
            self.table.drop(call.numbers("free"), call.numbers("forget"))
            verb = self._verbs.get(call.text("v"))
            if verb is None:
                raise Refused("this worker does not know that verb: is it of another version?")
            call.kind = call.kind or self._kind(call)
            return verb(call)
        except (Exception, SystemExit) as error:
            said = told(error)
            for number in (call.body.get("out", 0), *_wanted(call)):
                if type(number) is int and number > 0:
                    self.table.set(number, Failed(said))
                    if call.body.get("grad"):
                        self.table.nodes[number] = Failed(said)
            return {"error": said, "typed": isinstance(error, RalmqError)}, []


def _wanted(call: Call) -> list[Any]:
    found = call.body.get("wants", [])
    return found if isinstance(found, list) else []
