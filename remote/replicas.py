"""One module on several workers, a batch split over them, gradients averaged between them. Knows no message."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from ..schema.errors import Refused
from . import graph
from .hints import CHAINED, hinted
from .operators import scaled
from .owner.replicas import bunches, parts_of
from .peer import Handle, Pending
from .proxy import RemoteModule, Several
from .tensor import RemoteTensor, launch
from .values import Ref, pack


class DataParallel(Several):
    """Equal modules on different workers, called as one.

    Called, it gives each replica its rows of the batch and the results of all, joined on the first worker. In each
    backward pass the gradients become those of the whole batch, the same bits on every worker, before it returns, as
    in torch's DistributedDataParallel; within `no_sync` they stay apart and the next pass outside joins them.

    Args:
        proxies: copies of one module. The first one's weights are given to the others, from worker to worker.

    Raises:
        Refused: fewer than two, two on one worker, or modules that are not alike.
    """

    def __init__(self, proxies: Sequence[RemoteModule]) -> None:
        if isinstance(proxies, RemoteModule):
            raise Refused("replicas are a list of modules, each on a worker of its own: copy the module to each")
        self.proxies = list(proxies)
        self.alike = True
        hinted(self, CHAINED)
        peers = [proxy.peer for proxy in self.proxies]
        if len(peers) < 2 or len(set(peers)) < len(peers):
            raise Refused("replicas are on two workers at least, each on one of its own: copy the module to each")
        if len({peer.home for peer in peers}) > 1:
            raise Refused("replicas of one module are on workers of one broker")
        sizes = [pending.result()[0] for pending in [proxy.ask("sizes") for proxy in self.proxies]]
        odd = next((proxy for proxy, found in zip(self.proxies, sizes, strict=True) if found != sizes[0]), None)
        if odd is not None:
            raise Refused(f"{odd!r} is no replica of {self.proxies[0]!r}: other parameters, or others that train")
        self._sizes: dict[str, int] = dict(sizes[0]["parameters"])
        self._sync = True
        self._task = -1  # the backward pass that was seen last
        self._spread(sizes[0]["all"])

    def __call__(self, *args: Any, **kwargs: Any) -> RemoteTensor:
        """What the module returns for the whole batch: a tensor, or a tuple or map of them, joined along their rows.

        Args: tensors are split by rows (dimension 0), as evenly as it goes; all else goes to each replica.

        Raises:
            ValueError: tensors of different numbers of rows, or fewer rows than replicas.
        """
        recording, factor = torch.is_grad_enabled(), len(self.proxies)
        if recording:  # gradients of a replica's own count as many times as there are, since their mean is taken
            args = tuple(_scaled(value, 1 / factor) for value in args)
            kwargs = {name: _scaled(value, 1 / factor) for name, value in kwargs.items()}
        results = self.each(args, kwargs)
        peer = results[0].handle.peer
        found = launch(peer, "op", {"op": "joined"}, [(results,), {}])
        if found.token is not None:
            found = launch(peer, "op", {"op": "scaled"}, [(found, factor), {}])
            if self._sync and found.token is not None:
                found.token.register_hook(self._passed)
        return found

    def each(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[RemoteTensor]:
        """The result of each replica for its rows, where it lies."""
        count = len(self.proxies)
        rows = {len(value) for value in (*args, *kwargs.values()) if _is_tensor(value)}
        if len(rows) != 1 or min(rows) < count:
            raise ValueError(f"a batch for {count} replicas: give tensors of one number of rows, at least {count}")
        total = rows.pop()
        cuts = [place * total // count for place in range(count + 1)]
        results = []
        for proxy, begin, end in zip(self.proxies, cuts, cuts[1:], strict=False):
            own = [value[begin:end] if _is_tensor(value) else value for value in args]
            named = {name: value[begin:end] if _is_tensor(value) else value for name, value in kwargs.items()}
            results.append(proxy(*own, **named))
        return results

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes of what is called within leave each replica's gradients alone."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def average(self) -> None:
        """Makes each gradient the mean over the replicas; a backward pass ends with it.

        Raises:
            Refused: the replicas no longer train the same parameters.
        """
        for pending in self._averaging():
            pending.result()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The first replica's: parameters are equal everywhere, buffers each one's own."""
        return self.proxies[0].state_dict()

    def requires_grad_(self, flag: bool = True, names: Iterable[str] | None = None) -> Self:
        """These parameters of each replica, or all, train or do not."""
        chosen = None if names is None else list(names)
        for proxy in self.proxies:
            proxy.requires_grad_(flag, chosen)
        return self

    # -- inside

    def _passed(self, grad: torch.Tensor) -> None:
        """In a backward pass: once it has asked for all that it needs, gradients are averaged."""
        task = graph.task()
        if self._task != task:
            self._task = task
            graph.passing()  # what the pass itself raises comes first
            graph.at_the_end(self.average)

    def _averaging(self) -> list[Pending]:
        flags = [proxy.flags for proxy in self.proxies]
        if any(found != flags[0] for found in flags):
            raise Refused("replicas no longer train the same parameters: use DataParallel.requires_grad_")
        trained = [self._sizes[name] for name, flag in flags[0].items() if flag]
        asked: list[Pending] = []
        for first, last in bunches(trained):
            run: dict[str, Any] = {"first": first, "last": last}
            count = parts_of(sum(trained[first:last]), len(self.proxies))
            laid = []
            for proxy in self.proxies:
                parts = [proxy.peer.handle() for _ in range(count)]
                asked.append(proxy.ask("lay", wants=[part.number for part in parts], **run))
                laid.append(parts)
            if count == 1:
                whole = [part for (part,) in laid]
                asked += [_with(proxy, "take", whole, whole=True, **run) for proxy in self.proxies]
                continue
            means = []
            for place, proxy in enumerate(self.proxies):
                mean = proxy.peer.handle()
                asked.append(_with(proxy, "mean", [parts[place] for parts in laid], out=mean.number))
                means.append(mean)
            asked += [_with(proxy, "take", means, **run) for proxy in self.proxies]
        return asked

    def _spread(self, sizes: list[int]) -> None:
        """Gives the first replica's weights and buffers to the others."""
        first, *others = self.proxies
        asked: list[Pending] = []
        for begin, end in bunches(sizes):
            run: dict[str, Any] = {"first": begin, "last": end, "weights": True}
            parts = [first.peer.handle() for _ in range(begin, end)]
            asked.append(first.ask("lay", wants=[part.number for part in parts], **run))
            asked += [_with(proxy, "take", parts, **run) for proxy in others]
        for pending in asked:
            pending.result()


def _with(proxy: RemoteModule, verb: str, parts: list[Handle], **fields: Any) -> Pending:
    """A call about a module with values of any workers, which live until it has ended."""

    def other(value: Any) -> Ref | None:
        return value.ref(proxy.peer) if isinstance(value, Handle) else None

    packed = pack([parts], [], other)
    return proxy.ask(verb, keeps=[part for part in parts if part.peer is not proxy.peer], a=packed, **fields)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | RemoteTensor) and value.ndim > 0


def _scaled(value: Any, factor: float) -> Any:
    """The same value, whose gradient is multiplied on its way back."""
    if isinstance(value, RemoteTensor):
        if value.token is None:
            return value
        return launch(value.handle.peer, "op", {"op": "scaled"}, [(value, factor), {}])
    return scaled(value, factor)
