"""`ralmq.group`: the collectives as users call them, in a coroutine or not. Knows what may be given, what is late."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

import zmq

from ...schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ...schema.errors import RalmqError, Refused
from ...schema.keys import key_for
from ..direct.address import is_local, known, towards
from .arrays import check_op, described
from .collectives import Direct
from .errors import RankLost, RankMissing, named
from .meeting import Member, meet
from .mesh import Mesh

T = TypeVar("T")
OWN: Final = "each member needs a GPU of its own: see CUDA_VISIBLE_DEVICES, or use gloo"
BACKENDS: Final = ("direct", "gloo", "nccl", "auto")


def group(
    name: str,
    world_size: int,
    rank: int | None = None,
    *,
    broker: str | None = None,
    backend: str = "direct",
    wait: float = 60.0,
    timeout: float = 60.0,
    address: str = "",
    keys: str | os.PathLike[str] | None = None,
    context: zmq.Context[Any] | None = None,
) -> "Opening":
    """A group of processes that compute together; each calls this, with the same name and size.

    `async with ralmq.group("g", 4) as g` gives a Group, whose calls are awaited; `with ralmq.group("g", 4) as g` gives
    a SyncGroup with the same calls, which return when they are done.

    Args:
        rank: which one this is, from 0 on; None: the next that nobody asks for, in the order in which they come.
        broker: tcp://host:port or ipc://path; $RALMQ_BROKER where not given, else tcp://127.0.0.1:5555.
        backend: direct: over straight connections, summed in the order of the ranks; gloo or nccl: by
            torch.distributed; auto: nccl where each member has a GPU of its own, else gloo.
        wait: seconds for all members to come.
        timeout: seconds of a call, where it does not say otherwise.
        address: this machine's, as members on others reach it; that of the interface that leads to the broker where
            not given. Where the broker's is one of this machine alone, no port is opened.
        keys: a key file or a folder of keys, for a broker that asks for one; $RALMQ_KEYS where not given.

    Raises:
        Refused: a size, rank or backend that cannot be.
    """
    if type(world_size) is not int or world_size < 1:
        raise Refused(f"world_size: {world_size!r} is no number of members: give 1 or more")
    if rank is not None and (type(rank) is not int or not 0 <= rank < world_size):
        raise Refused(f"rank: there is no rank {rank!r} among {world_size}: they count from 0")
    if backend not in BACKENDS:
        raise Refused(f"backend: there is no {backend!r}: use one of {', '.join(BACKENDS)}")
    url = broker or os.environ.get(BROKER_VARIABLE) or DEFAULT_BROKER
    return Opening(Group(name, world_size, rank, url, backend, wait, timeout, address, keys, context))


class Group:
    """The calls of one member. All members make the same calls, in the same order.

    Arrays may be numpy's or torch tensors, bf16 included, and may change when a call has returned. What a member gets
    is new, of the kind that it gave, a tensor on the device of its own. Each call takes `timeout`, in seconds.

    What goes wrong in a call ends the group, for all members: RankMissing names those that did not take part in time,
    RankLost those that died or left, Refused says which calls do not belong together.

    Attributes:
        name: of the group.
        rank, size: which one this is, and of how many.
    """

    def __init__(
        self,
        name: str,
        size: int,
        rank: int | None,
        url: str,
        backend: str,
        wait: float,
        timeout: float,
        address: str,
        keys: str | os.PathLike[str] | None,
        context: zmq.Context[Any] | None,
    ) -> None:
        self.name = name
        self.size = size
        self.rank = -1 if rank is None else rank
        self._wanted = rank
        self._url, self._keys, self._context = url, keys, context
        self._backend, self._wait, self._timeout, self._address = backend, wait, timeout, address
        self._calls: Any = None

    async def broadcast(self, x: Any = None, root: int = 0, *, timeout: float | None = None) -> Any:
        """The root's array, at all members; the others need not give one."""
        self._check_root(root)
        if self.rank == root:
            described(x)
        return await self._call(["broadcast", root], lambda n: self._calls.broadcast(n, x, root), timeout)

    async def scatter(self, parts: Sequence[Any] | None = None, root: int = 0, *, timeout: float | None = None) -> Any:
        """Each member's part of what the root gives: an array for each rank, of any sizes."""
        self._check_root(root)
        own = self._parts(parts) if self.rank == root else []
        return await self._call(["scatter", root], lambda n: self._calls.scatter(n, own, root), timeout)

    async def gather(self, x: Any, root: int = 0, *, timeout: float | None = None) -> list[Any] | None:
        """The arrays of all, by rank, at the root; None elsewhere. Their sizes may differ."""
        self._check_root(root)
        described(x)
        found = await self._call(["gather", root], lambda n: self._calls.gather(n, x, root), timeout)
        return found if self.rank == root else None

    async def all_gather(self, x: Any, *, timeout: float | None = None) -> list[Any]:
        """The arrays of all, by rank. Their sizes may differ."""
        described(x)
        found: list[Any] = await self._call(["all_gather"], lambda n: self._calls.all_gather(n, x), timeout)
        return found

    async def reduce(self, x: Any, op: str = "sum", root: int = 0, *, timeout: float | None = None) -> Any:
        """What `all_reduce` gives, at the root; None elsewhere."""
        self._check_root(root)
        what = ["reduce", root, *self._reduced(x, op)]
        return await self._call(what, lambda n: self._calls.reduce(n, x, op, root), timeout)

    async def all_reduce(self, x: Any, op: str = "sum", *, timeout: float | None = None) -> Any:
        """Sum, mean, max, min or prod of the arrays of all, element by element; they have one shape and dtype.

        With the backend `direct` the summands come in the order of the ranks; bf16 and f16 are computed in float32 and
        rounded once. The mean of integers is float64.
        """
        what = ["all_reduce", *self._reduced(x, op)]
        return await self._call(what, lambda n: self._calls.all_reduce(n, x, op), timeout)

    async def reduce_scatter(self, parts: Sequence[Any], op: str = "sum", *, timeout: float | None = None) -> Any:
        """`all_reduce` of the parts for this member: each gives an array for each rank, of any sizes, one dtype."""
        own = self._parts(parts)
        forms = [self._reduced(part, op) for part in own]
        if len({form[1] for form in forms}) > 1:
            raise Refused("reduce_scatter: the parts have several dtypes: convert them to one")
        what = ["reduce_scatter", op, forms[0][1], [form[2] for form in forms]]
        return await self._call(what, lambda n: self._calls.reduce_scatter(n, own, op), timeout)

    async def barrier(self, *, timeout: float | None = None) -> None:
        """Returns when all members have called it."""
        await self._call(["barrier"], lambda n: self._calls.barrier(n), timeout)

    # -- inside

    async def open(self) -> None:
        """Meets the others, and connects to each."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._wait
        gpu = self._gpu()
        far = "" if is_local(self._url) and not self._address else self._reached()
        self._mesh = Mesh(far, key_for(self._url, self._keys, works=True) is not None)
        try:
            terms = {"world_size": self.size, "backend": self._backend}
            member = Member(self._wanted, self._mesh.direct, terms, {"gpu": gpu})
            table = await meet(self._url, self.name, member, self._wait, context=self._context, keys=self._keys)
            self.rank = table.rank
            self._mesh.join(table)
            self._calls = Direct(self._mesh)
            await self.barrier(timeout=max(1.0, end - loop.time()))
            backend = self._chosen([facts["gpu"] for _, facts in table.members])
            if backend != "direct":
                from .distributed import opened

                hosts = [direct.host for direct, _ in table.members]
                left = max(1.0, end - loop.time())
                async with asyncio.timeout(left):
                    self._calls = await opened(self._mesh, backend, hosts, self._reached, left)
        except BaseException:
            self._calls = None
            self._mesh.close()
            raise

    async def close(self) -> None:
        """Leaves the group; the others get all that was sent to them."""
        calls, self._calls = self._calls, None
        if calls is not None:
            await calls.close()
            await self._mesh.leave()

    async def _call(self, what: list[Any], run: Callable[[int], Awaitable[T]], timeout: float | None) -> T:
        if self._calls is None:
            raise Refused("the group is not open: use `async with ralmq.group(...) as g`")
        mesh = self._mesh
        seconds = self._timeout if timeout is None else timeout
        number = mesh.begin(what)
        try:
            async with asyncio.timeout(seconds):
                return await run(number)
        except TimeoutError:
            raise await self._late(number, what[0], seconds) from None
        except BaseException as error:
            given_up = RankLost(f"rank {self.rank} of {self.size} gave up its call of {what[0]}", [self.rank])
            mesh.fail(error if isinstance(error, RalmqError) else given_up)
            raise
        finally:
            mesh.end(number)

    async def _late(self, number: int, what: str, seconds: float) -> RalmqError:
        """Why a call has not ended in time: of this member, unless another one said it first."""
        ranks = await self._mesh.missing(number)
        text = f"{named(ranks)} of {self.size} did not take part in {what} within {seconds:g} s"
        if not ranks:
            text = f"{what} did not end within {seconds:g} s, though all members take part: raise the timeout"
        self._mesh.fail(RankMissing(f"group {self.name}: {text}", ranks))
        assert self._mesh.fault is not None
        return self._mesh.fault

    def _reached(self) -> str:
        """This machine's address, as members on others reach it."""
        return known(self._address) if self._address else towards(self._url)

    def _gpu(self) -> str:
        if self._backend not in ("nccl", "auto"):
            return ""
        from .distributed import gpu

        found = gpu()
        if self._backend == "nccl" and not found:  # at once: the others may not have come
            raise Refused(f"backend nccl: this process sees no GPU, and {OWN}")
        return found

    def _chosen(self, gpus: list[str]) -> str:
        """The backend, equal for all."""
        own = all(gpus) and len(set(gpus)) == len(gpus)
        if self._backend == "nccl" and not own:
            raise Refused(f"backend nccl: {OWN}")
        return self._backend if self._backend != "auto" else "nccl" if own else "gloo"

    def _check_root(self, root: int) -> None:
        if type(root) is not int or not 0 <= root < self.size:
            raise Refused(f"root: there is no rank {root!r} among {self.size}: they count from 0")

    def _parts(self, parts: Sequence[Any] | None) -> list[Any]:
        found = list(parts) if parts is not None else []
        if len(found) != self.size:
            raise Refused(f"parts: {len(found)} arrays for {self.size} members: give one for each rank")
        for part in found:
            described(part)
        return found

    def _reduced(self, x: Any, op: str) -> list[Any]:
        form = described(x)
        check_op(op, form[0])
        if self._calls is not None:
            self._calls.check(form[0])
        return [op, *form]


class SyncGroup:
    """The same calls, each of which returns when it is done; the event loop runs in a thread of its own."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"group-{group.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self._group.name

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def size(self) -> int:
        return self._group.size

    def broadcast(self, x: Any = None, root: int = 0, *, timeout: float | None = None) -> Any:
        return self.run(self._group.broadcast(x, root, timeout=timeout))

    def scatter(self, parts: Sequence[Any] | None = None, root: int = 0, *, timeout: float | None = None) -> Any:
        return self.run(self._group.scatter(parts, root, timeout=timeout))

    def gather(self, x: Any, root: int = 0, *, timeout: float | None = None) -> list[Any] | None:
        return self.run(self._group.gather(x, root, timeout=timeout))

    def all_gather(self, x: Any, *, timeout: float | None = None) -> list[Any]:
        return self.run(self._group.all_gather(x, timeout=timeout))

    def reduce(self, x: Any, op: str = "sum", root: int = 0, *, timeout: float | None = None) -> Any:
        return self.run(self._group.reduce(x, op, root, timeout=timeout))

    def all_reduce(self, x: Any, op: str = "sum", *, timeout: float | None = None) -> Any:
        return self.run(self._group.all_reduce(x, op, timeout=timeout))

    def reduce_scatter(self, parts: Sequence[Any], op: str = "sum", *, timeout: float | None = None) -> Any:
        return self.run(self._group.reduce_scatter(parts, op, timeout=timeout))

    def barrier(self, *, timeout: float | None = None) -> None:
        self.run(self._group.barrier(timeout=timeout))

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call of the group gives; Ctrl-C gives it up."""
        if self._loop.is_closed():
            call.close()
            raise Refused("the group is closed: open it anew")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end(self) -> None:
        """Of the thread, and of what it still runs."""
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Opening:
    """What `ralmq.group` returns: opened by `async with`, or by `with`."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sync: SyncGroup | None = None

    async def __aenter__(self) -> Group:
        await self._group.open()
        return self._group

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._group.close()

    def __enter__(self) -> SyncGroup:
        self._sync = SyncGroup(self._group)
        try:
            self._sync.run(self._group.open())
        except BaseException:
            self._sync.end()
            raise
        return self._sync

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._sync is not None
        try:
            self._sync.run(self._group.close())
        finally:
            self._sync.end()
