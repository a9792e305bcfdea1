"""What one caller has on this worker: values by number, and the calls that its gradients go back through.

Numbers are drawn by the caller. The compute thread writes; the event loop waits for what is not there yet.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...schema.errors import DeadlineExceeded, WorkerLost
from ..failures import raised
from ..values import leaves

PATIENCE: Final = 600.0  # seconds that another worker may wait for a value
Waiter = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Failed:
    """In the place of a value: what its call raised, as it travels."""

    said: dict[str, Any]


@dataclass(slots=True)
class Node:
    """A call that gradients can go back through.

    Attributes:
        outputs: its result's tensors, in order.
        inputs: of each handle or tensor among its arguments, the leaves that stood for its tensors.
        kind: the call's, of those that take about equally long.
    """

    outputs: list[torch.Tensor]
    inputs: list[list[torch.Tensor]]
    kind: Hashable = None


class Table:
    """Values and calls of one caller."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.get_ident()  # of the loop, which makes it
        self._lock = threading.Lock()
        self._values: dict[int, Any] = {}
        self._waiters: dict[int, list[Waiter]] = {}
        self._closed = False
        self.nodes: dict[int, Node | Failed] = {}
        self.ran: list[str] = []  # tags of calls, in the order in which they ran

    def __len__(self) -> int:
        return len(self._values)

    def set(self, number: int, value: Any) -> None:
        with self._lock:
            if self._closed:
                return
            self._values[number] = value
            waiters = self._waiters.pop(number, ())
        self._tell(waiters)

    def value(self, number: int) -> Any:
        """What lies there; for a Failed, raises what its call raised.

        Raises:
            KeyError: nothing does.
            WorkerLost: the caller is gone.
        """
        try:
            found = self._values[number]
        except KeyError:
            if self._closed:
                raise WorkerLost("the caller of this value is gone, and the value with it") from None
            raise KeyError(f"no value {number} is on this worker: it was freed, or never made") from None
        if isinstance(found, Failed):
            raise raised(found.said)
        return found

    def peek(self, number: int) -> Any:
        """What lies there, a Failed too; None where nothing does."""
        return self._values.get(number)

    def when(self, number: int, then: Waiter) -> None:
        """Calls `then` in the event loop once there is a value, or the caller is gone; at once where that is so."""
        with self._lock:
            if number not in self._values and not self._closed:
                self._waiters.setdefault(number, []).append(then)
                return
        then()

    async def wait(self, number: int) -> Any:
        """What lies there once it is made.

        Raises:
            DeadlineExceeded: it was not made in time.
            WorkerLost: the caller is gone.
        """
        made: asyncio.Future[None] = self._loop.create_future()
        self.when(number, lambda: None if made.done() else made.set_result(None))
        try:
            await asyncio.wait_for(made, PATIENCE)
        except TimeoutError:
            raise DeadlineExceeded(f"value {number} was not made within {PATIENCE:g} s") from None
        return self.value(number)

    def drop(self, values: list[int], nodes: list[int]) -> None:
        for number in values:
            self._values.pop(number, None)
        for number in nodes:
            self.nodes.pop(number, None)

    def shares(self, tensor: torch.Tensor, number: int) -> bool:
        """Whether another value lies in the memory of this one, which is value `number`."""
        place = tensor.untyped_storage().data_ptr()
        return any(
            leaf.untyped_storage().data_ptr() == place
            for own, other in list(self._values.items())
            if own != number
            for leaf in leaves(other)
        )

    def close(self) -> None:
        """Frees everything; who waits is told."""
        with self._lock:
            self._closed = True
            self._values.clear()
            self.nodes.clear()
            waiters = [waiter for found in self._waiters.values() for waiter in found]
            self._waiters.clear()
        self._tell(waiters)

    def _tell(self, waiters: Sequence[Waiter]) -> None:
        if not waiters:
            return
        if threading.get_ident() == self._thread:
            _call(waiters)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_call, waiters)


def _call(waiters: Sequence[Waiter]) -> None:
    for waiter in waiters:
        waiter()
