"""The collectives by torch.distributed: gloo, or NCCL between GPUs. Members meet by what the mesh tells them.

Shapes go over the mesh, so that they may differ; the mesh also knows who has died, which torch only sees as an error.
"""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from ...schema.errors import RalmqError, Refused
from .arrays import MEAN, NAMES, Elements, is_torch
from .collectives import Calls
from .errors import RankLost
from .mesh import Mesh

INTERFACE: Final = "GLOO_SOCKET_IFNAME"  # environment: the interface that members talk through; as in torch
KNOWN: Final = 3.0  # seconds until the mesh knows who has died
FOR_EVER: Final = timedelta(days=365)  # calls have their own time-out
LOOPBACK: Final = "127.0.0.1"
REDUCED: Final = frozenset(  # what gloo and NCCL both do
    ["bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
_APART: Final[Any] = dist  # its stubs do not export all of it
Thread = Callable[[Callable[[], None]], Awaitable[None]]
_OPS: Final = {
    "sum": dist.ReduceOp.SUM,
    MEAN: dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


def gpu() -> str:
    """The GPU that this process uses; empty where it has none."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


async def opened(
    mesh: Mesh, backend: str, hosts: Sequence[str], address: Callable[[], str], within: float
) -> "Distributed":
    """Connects all members; each calls it.

    Args:
        backend: gloo or nccl.
        hosts: where each member is.
        address: this machine's, as the others see it; asked for where they are on several.
        within: seconds after which torch gives it up, too.

    Raises:
        RalmqError: they cannot connect.
    """
    calls, limit = Calls(mesh), timedelta(seconds=within)
    near = len(set(hosts)) == 1
    own = LOOPBACK if near else address().strip("[]")
    number = mesh.begin(["open", backend])
    folder = tempfile.mkdtemp(prefix="ralmq-group-") if near and mesh.rank == 0 else ""
    try:
        try:
            made = Distributed(mesh, calls, backend)
            where: dict[str, Any] = {"file": str(Path(folder) / "store")} if near else {"host": own}
            if mesh.rank == 0 and not near:
                made.store = _APART.TCPStore(own, 0, mesh.size, True, limit, wait_for_workers=False)
                where["port"] = made.store.port
            where = _read(await calls.broadcast(number, _text(where) if mesh.rank == 0 else None, 0))
            await made.connect(where, own, limit)
        finally:
            mesh.end(number)
        last = mesh.begin(["opened", backend])
        try:
            await calls.barrier(last)
        finally:
            mesh.end(last)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return made


class Distributed:
    """One member's process group of torch; none of the names that torch keeps for a whole process is used."""

    def __init__(self, mesh: Mesh, calls: Calls, backend: str) -> None:
        self._mesh = mesh
        self._calls = calls
        self._backend = backend
        self._group: Any = None
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        self.store: Any = None  # where torch's members find each other: a file of rank 0, or its port
        self.barrier = calls.barrier

    async def connect(self, where: dict[str, Any], own: str, limit: timedelta) -> None:
        """Returns once all are connected.

        Args:
            where: the store is.
            own: this machine's address, to which gloo binds.
        """
        rank, size = self._mesh.rank, self._mesh.size

        def connect() -> None:
            if self.store is None and "file" in where:
                self.store = _APART.FileStore(where["file"], size)
            elif self.store is None:
                self.store = _APART.TCPStore(where["host"], where["port"], size, False, limit)
            self.store.set_timeout(limit)
            if self._backend == "nccl":  # it connects at the first call
                self._group = dist.ProcessGroupNCCL(self.store, rank, size, dist.ProcessGroupNCCL.Options())
                return
            gloo: Any = dist.ProcessGroupGloo
            options, named = gloo._Options(), os.environ.get(INTERFACE)
            device = gloo.create_device(interface=named) if named else gloo.create_device(hostname=own)
            options._devices, options._timeout = [device], limit
            group = gloo(self.store, rank, size, options)
            group._set_default_timeout(FOR_EVER)
            self._group = group

        await self._done(connect, _apart)  # it knows of no member that dies before it has come

    def check(self, dtype: str) -> None:
        """Raises Refused for what torch does not reduce."""
        if dtype not in REDUCED:
            raise Refused(f"backend {self._backend} does not reduce {dtype}: convert it, or leave the backend away")

    async def close(self) -> None:
        """Ends this member's connections."""
        group, self._group = self._group, None
        self.store = None
        if group is not None:
            await asyncio.to_thread(group.abort)

    async def broadcast(self, number: int, x: Any, root: int) -> Any:
        told = _text(_form(x)) if self._mesh.rank == root else None
        form = _read(await self._calls.broadcast(number, told, root))
        tensor = self._own(x) if self._mesh.rank == root else self._empty(form)
        await self._done(lambda: self._broadcast(tensor, root=root))
        return _as_given(tensor, x, form)

    async def scatter(self, number: int, parts: Sequence[Any], root: int) -> Any:
        rank = self._mesh.rank
        forms = [_text(_form(part)) for part in parts]
        form = _read(await self._calls.scatter(number, forms, root))
        if rank == root:
            own = [self._own(part) for part in parts]
            await self._done(lambda: [self._group.send([own[to]], to, 0).wait() for to in self._mesh.others])
            return _as_given(own[root], parts[root], form)
        tensor = self._empty(form)
        await self._done(lambda: self._group.recv([tensor], root, 0).wait())
        return _as_given(tensor, None, form)

    async def gather(self, number: int, x: Any, root: int) -> list[Any]:
        forms = await self._calls.gather(number, _text(_form(x)), root)
        own = self._own(x)
        if not forms:
            await self._done(lambda: self._group.send([own], root, 0).wait())
            return []
        found = [own if rank == root else self._empty(_read(form)) for rank, form in enumerate(forms)]
        await self._done(lambda: [self._group.recv([found[of]], of, 0).wait() for of in self._mesh.others])
        return [_as_given(tensor, x, {}) for tensor in found]

    async def all_gather(self, number: int, x: Any) -> list[Any]:
        forms = await self._calls.all_gather(number, _text(_form(x)))
        own, rank = self._own(x), self._mesh.rank
        found = [own if of == rank else self._empty(_read(form)) for of, form in enumerate(forms)]
        await self._done(lambda: self._broadcast(*found))
        return [_as_given(tensor, x, {}) for tensor in found]

    async def reduce(self, number: int, x: Any, op: str, root: int) -> Any:
        tensor = self._own(x)
        await self._calls.barrier(number)
        await self._done(lambda: self._reduce(op, tensor, root=root))
        return _as_given(self._mean(tensor, op), x, {}) if self._mesh.rank == root else None

    async def all_reduce(self, number: int, x: Any, op: str) -> Any:
        tensor = self._own(x)
        options = _APART.AllreduceOptions()
        options.reduceOp = _OPS[op]
        await self._calls.barrier(number)  # torch would not say that another call is made
        await self._done(lambda: self._group.allreduce([tensor], options).wait())
        return _as_given(self._mean(tensor, op), x, {})

    async def reduce_scatter(self, number: int, parts: Sequence[Any], op: str) -> Any:
        own = [self._own(part) for part in parts]
        await self._calls.barrier(number)
        await self._done(lambda: self._reduce(op, *own))
        return _as_given(self._mean(own[self._mesh.rank], op), parts[0], {})

    # -- inside

    def _broadcast(self, *tensors: torch.Tensor, root: int = 0) -> None:
        """From the root, those behind the first from the ranks that follow."""
        for rank, tensor in enumerate(tensors, root):
            options = _APART.BroadcastOptions()
            options.rootRank = rank
            self._group.broadcast([tensor], options).wait()

    def _reduce(self, op: str, *tensors: torch.Tensor, root: int = 0) -> None:
        """To the root, those behind the first to the ranks that follow."""
        for rank, tensor in enumerate(tensors, root):
            options = _APART.ReduceOptions()
            options.rootRank, options.reduceOp = rank, _OPS[op]
            self._group.reduce([tensor], options).wait()

    def _mean(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        if op != MEAN:
            return tensor
        return (tensor if tensor.is_floating_point() else tensor.double()) / self._mesh.size

    def _own(self, x: Any) -> torch.Tensor:
        """A copy, where torch takes it: it is written to."""
        try:
            tensor = x.detach() if is_torch(x) else torch.from_numpy(np.array(x))
        except TypeError as error:
            raise Refused(f"torch does not take this array ({error}): convert it, or leave the backend away") from None
        return tensor.to(self._device, copy=True, memory_format=torch.contiguous_format)

    def _empty(self, form: dict[str, Any]) -> torch.Tensor:
        if form["dtype"] not in NAMES:
            raise Refused(f"dtype {form['dtype']} does not travel: cast to one of {', '.join(NAMES)}")
        return torch.empty(form["shape"], dtype=getattr(torch, form["dtype"]), device=self._device)

    async def _done(self, call: Callable[[], Any], thread: Thread = asyncio.to_thread) -> None:
        """Runs what waits in a thread; where a member dies, or this call is given up, it is ended.

        Raises:
            RalmqError: what ended it.
        """

        def run() -> None:
            call()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        running = asyncio.ensure_future(thread(run))
        watching = asyncio.ensure_future(self._mesh.over())
        try:
            await asyncio.wait([running, watching], return_when=asyncio.FIRST_COMPLETED)
            if not running.done() or running.exception() is not None:
                await asyncio.wait([watching], timeout=KNOWN)
                self._failed(running)
        finally:
            watching.cancel()
            if not running.done():
                if self._group is not None:
                    self._group.abort()
                else:
                    running.cancel()
                running.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _failed(self, running: "asyncio.Future[None]") -> None:
        if self._mesh.fault is not None:
            raise self._mesh.fault
        error = running.exception()
        if isinstance(error, RalmqError):
            raise error
        raise RankLost(f"{self._backend} has failed: {str(error).splitlines()[0][:300]}") from error


async def _apart(call: Callable[[], None]) -> None:
    """Runs what cannot be ended in a thread that nobody waits for where it is given up."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def end(error: Exception | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        error = None
        try:
            call()
        except Exception as found:
            error = found
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end, error)

    threading.Thread(target=run, daemon=True, name="connecting").start()
    await done


def _form(x: Any) -> dict[str, Any]:
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "torch": is_torch(x)}


def _text(document: dict[str, Any]) -> Elements:
    data = np.frombuffer(json.dumps(document).encode(), np.uint8)
    return Elements("u8", data.shape, data)


def _read(elements: Elements) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(elements.flat.tobytes())
    return found


def _as_given(tensor: torch.Tensor, given: Any, form: dict[str, Any]) -> Any:
    """A tensor where one was given, or the sender had one; else an array."""
    if is_torch(given):
        return tensor.to(given.device)
    if given is None and form.get("torch"):
        return tensor
    return tensor.cpu().numpy()
