"""The built-in worker `module`: modules and tensors of callers, one torch thread. Knows sessions and ways, no layer."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from ..schema.errors import DeadlineExceeded, RalmqError, Refused, WorkerFailed, WorkerLost
from ..schema.message import Error
from ..schema.message import Final as End
from ..schema.tensor import Tensor
from ..workers.base import Answer, Request, Worker
from ..workers.registry import imported, look_here
from .classes import torch_classes, wire_name
from .failures import raised, told
from .owner.compute import VERBS
from .owner.models import Models
from .owner.optimizers import VERBS as OPTIMIZERS
from .owner.pretrained import Pretrained
from .owner.replicas import VERBS as REPLICAS
from .owner.session import Pulled, Session
from .peer import SERVICE
from .straight import Straight
from .values import Ref, pack

GRACE: Final = 30.0  # seconds for which a caller's values outlive the broker
PULL: Final = 600.0  # seconds that another worker is given to make a value and send it


class ModuleWorker(Worker):
    """Holds modules and tensors of callers, and computes with them where they are.

    Args:
        name: under which callers name it; the service is module:<name>. One process has it.
        device: cpu, cuda, cuda:1 ...: where modules are put that a caller puts nowhere.
        threads: of torch.
        allow: classes of modules that callers may build here beside those of torch.nn, as package.module:Class, with
            commas between them.
        models: a folder of model directories, of which callers load parts by name (`ralmq.from_pretrained`).
        capacity: calls that wait here at a time, of all callers together, where they come through the broker.
    """

    def __init__(
        self,
        *,
        name: str,
        device: str = "cpu",
        threads: int = 1,
        allow: str = "",
        models: str = "",
        capacity: int = 4096,
    ) -> None:
        if not name:
            raise Refused("a module worker needs a name: give -o name=NAME")
        self.service = f"{SERVICE}{name}"
        self.capacity = capacity
        self.identity = f"process {os.urandom(8).hex()}"  # what it holds no other has
        try:
            self._device = torch.device(device)
            torch.empty(1, device=self._device)
        except (RuntimeError, AssertionError) as error:
            raise Refused(f"device={device} cannot be used: {str(error).splitlines()[0]}") from None
        look_here()
        own = [imported(target, nn.Module, "torch.nn.Module") for target in filter(None, allow.split(","))]
        self._allowed = {wire_name(kind): kind for kind in own}
        built = Models({**torch_classes(), **self._allowed}, {kind.__name__: kind for kind in own})
        self._verbs = {**VERBS, **OPTIMIZERS, **REPLICAS, **built.verbs, **Pretrained(models).verbs}
        self._compute = ThreadPoolExecutor(1, "compute", torch.set_num_threads, (threads,))
        self._sessions: dict[bytes, Session] = {}
        self._orphans: set[bytes] = set()  # sessions of callers that have yet to come back to the broker
        self._tasks: set[asyncio.Task[Any]] = set()
        self._straight: Straight | None = None

    async def start(self) -> None:
        self._straight = Straight(self._came)

    async def stop(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        if self._straight is not None:
            self._straight.close()
        self._compute.shutdown(wait=False, cancel_futures=True)

    @property
    def held(self) -> int:
        """Values of all callers."""
        return sum(len(session.table) for session in self._sessions.values())

    def handle(self, request: Request) -> Any:
        verb = request.body.get("v")
        if verb == "open":
            return self._open(request)
        if verb == "pull":
            return self._pull(request.body)
        if verb == "held":
            return self._held()
        return self._call(request)

    def forgotten(self) -> None:
        """The broker is gone; callers that find it again find their values, too."""
        self._orphans |= set(self._sessions)
        asyncio.get_running_loop().call_later(GRACE, self._left, set(self._orphans))

    # -- inside

    async def _held(self) -> Answer:
        return {"values": self.held, "sessions": len(self._sessions)}

    async def _open(self, request: Request) -> AsyncIterator[Answer]:
        """A caller's session: it lasts as long as this request does."""
        key = request.body.get("c")
        if type(key) is not bytes or len(key) != 16:
            raise Refused("a session without its name")
        if key in self._orphans:
            self._orphans.discard(key)
        elif key in self._sessions:
            raise Refused("this session is open already")
        elif request.attempt or request.body.get("again"):
            raise WorkerLost("the broker was lost, and with it what this caller had here: copy its modules again")
        else:
            self._sessions[key] = Session(self._verbs, self._ask, self._compute, self._device)
        straight = self._straight
        assert straight is not None
        try:
            yield {"near": straight.near, "host": straight.host, "allow": list(self._allowed)}
            await asyncio.Event().wait()
        finally:
            if key not in self._orphans and key in self._sessions:
                self._sessions.pop(key).close()

    def _left(self, keys: set[bytes]) -> None:
        for key in keys & self._orphans:
            self._orphans.discard(key)
            if key in self._sessions:
                self._sessions.pop(key).close()

    def _session(self, body: dict[str, Any]) -> Session:
        found = self._sessions.get(body.get("c", b""))
        if found is None:
            raise WorkerLost("this worker has nothing of that caller: it was started anew, or the caller has ended")
        return found

    def _call(self, request: Request) -> "asyncio.Future[Answer]":
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._session(request.body).arrive(request.body, request.tensors, partial(_resolve, future))
        return future

    def _came(self, body: dict[str, Any], tensors: Sequence[Tensor], answer: Callable[[End | Error], None]) -> None:
        """A request that came straight."""
        try:
            if body.get("v") == "pull":
                self._pull_straight(body, answer)
            else:
                self._session(body).arrive(body, tensors, lambda found: answer(End(*found)))
        except RalmqError as error:
            answer(Error(error.code, error.message))

    def _pull_straight(self, body: dict[str, Any], answer: Callable[[End | Error], None]) -> None:
        table, number = self._session(body).table, _number(body)
        if self._device.type != "cpu":  # the copy from the device takes its time
            self._begin(self._pull(body), lambda found: answer(End(*found)))
            return

        def made() -> None:
            answer(End(*_packed(lambda: table.value(number))))

        table.when(number, made)

    async def _pull(self, body: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """A value for another worker, once it is made."""
        table, number = self._session(body).table, _number(body)
        try:
            value = await table.wait(number)
        except Exception as error:
            return {"error": told(error)}, []
        return await asyncio.to_thread(_packed, lambda: value)

    def _ask(self, ref: Ref, done: Callable[[Pulled], None]) -> None:
        """Asks another worker for a value, straight where it is on this host, else through the broker."""
        body = {"v": "pull", "c": ref.session, "number": ref.number}
        if not ref.near or self._straight is None:
            self._begin(self._brokered(ref, body), done)
            return
        late = DeadlineExceeded(f"a value of {ref.service} did not come within {PULL:g} s")
        timer = asyncio.get_running_loop().call_later(PULL, done, late)

        def ended(found: End | RalmqError) -> None:
            timer.cancel()
            done(found if isinstance(found, RalmqError) else _checked(found.body, found.tensors))

        try:
            self._straight.ask(ref.near, body, (), ended)
        except RalmqError as error:
            timer.cancel()
            done(error)

    async def _brokered(self, ref: Ref, body: dict[str, Any]) -> Pulled:
        if not ref.service.startswith(SERVICE):  # the caller's own rights may be fewer than this worker's
            return Refused("a value on what is no module worker")
        try:
            reply = await self.host.client.request(ref.service, body, deadline=PULL)
        except Exception as error:  # whatever it is, the call waits for an end
            return error
        return _checked(reply.body, reply.tensors)

    def _begin(self, work: Coroutine[Any, Any, Any], done: Callable[[Any], None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda found: None if found.cancelled() else done(found.result()))


def _number(body: dict[str, Any]) -> int:
    number = body.get("number")
    if type(number) is not int:
        raise Refused("a value without its number")
    return number


def _packed(value: Callable[[], Any]) -> tuple[dict[str, Any], list[Any]]:
    tensors: list[Any] = []
    try:
        return {"a": pack(value(), tensors)}, tensors
    except Exception as error:
        return {"error": told(error)}, []


def _checked(body: dict[str, Any], tensors: Sequence[Tensor]) -> Pulled:
    if "error" in body:
        return raised(body["error"])
    return (body, tensors) if "a" in body else WorkerFailed("another worker answered without a value")


def _resolve(future: "asyncio.Future[Any]", found: Any) -> None:
    if not future.done():
        future.set_result(found)
