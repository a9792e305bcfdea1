"""STEPs straight to the next stage of a pipeline. The broker says where that is; all else stays with it.

Knows doors and lanes, not what a STEP computes. A lane that ends takes its pipeline with it: what was on its way is
lost, and only a replay brings it back.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ...schema.codec import decode, encode
from ...schema.errors import Malformed, RalmqError
from ...schema.frame import Prefix, read_prefix
from ...schema.keys import key_for
from ...schema.limits import NO_ID
from ...schema.message import Direct, Step
from ..direct.address import is_local, towards
from ..direct.door import Door
from ..direct.lane import Lane

log = logging.getLogger("ralmq.stage")
MEET: Final = 3.0  # seconds in which the next stage must be reached; else the broker brings it its STEPs
GRACE: Final = 0.3  # seconds in which the broker may say that a neighbour is gone, before this stage says it
EARLY: Final = 4  # pipelines whose STEPs may come before their FORM: they come by another way
AHEAD: Final = 1024  # STEPs of such a pipeline, at most
PAST: Final = 16  # pipelines whose late STEPs are known to be late


class Ring:
    """The doors of one stage.

    Args:
        url: the broker's address; where it is local, so are all stages, and no port is opened.
        take: prefix and STEP of the pipeline that this stage is in.
        broken: called with the reason when the lane to the next stage has ended.
        around: takes STEPs, and their flags, that are to go through the broker after all.
        address: this machine's, as the neighbours see it; "" for that of the interface that leads to the broker.

    Raises:
        Refused: the address is not this machine's, or none leads to the broker.
    """

    def __init__(
        self,
        url: str,
        take: Callable[[Prefix, Any], None],
        broken: Callable[[str], None],
        around: Callable[[Step, int], None],
        address: str = "",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._broken = broken
        self._around = around
        far = "" if is_local(url) and not address else address or towards(url)
        # without keys nobody else listens to a broker of this machine, but somebody may to what this port is told
        secure = key_for(url, None, works=True) is not None or (is_local(url) and not is_local(f"tcp://{far}:0"))
        self._door = Door(self._arrived, far=far, secure=secure)
        self._pipeline = NO_ID
        self._lane: Lane | None = None
        self._kept: list[tuple[Step, int, list[Any]]] | None = None  # for a stage that is not reached yet
        self._early: dict[bytes, list[tuple[Prefix, Step]]] = {}
        self._past: deque[bytes] = deque(maxlen=PAST)
        self._timer: asyncio.TimerHandle | None = None
        self.sent = self.bytes = 0  # STEPs that went straight

    @property
    def direct(self) -> Direct:
        """What the broker is told."""
        return self._door.direct

    def form(self, pipeline: bytes, onward: Direct | None) -> None:
        """This stage is in a pipeline; without a way onward its STEPs go through the broker."""
        self.over()
        self._pipeline = pipeline

        def met() -> None:  # both later: the lane may end, or be met, before it is there
            self._loop.call_soon(self._met, pipeline)

        def cut(reason: str) -> None:
            self._loop.call_soon(self._ended, pipeline, reason)

        if onward is not None:
            try:
                self._lane = Lane(onward, cut, met)
            except RalmqError as error:
                log.warning("steps go through the broker: %s", error.message)
            else:
                self._kept = []
                self._timer = self._loop.call_later(MEET, self._not_met, f"{self._lane.url} does not answer")
        for prefix, step in self._early.pop(pipeline, ()):
            self._take(prefix, step)

    def over(self) -> None:
        """The pipeline is no more."""
        if self._pipeline != NO_ID:
            self._past.append(self._pipeline)
            self._door.forget()
        self._pipeline, self._kept = NO_ID, None
        self._unset()
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def send(self, step: Step, epoch: int, flags: int = 0) -> bool:
        """Whether it went straight to the next stage. Raises Malformed for what does not fit into a message."""
        if self._lane is None:
            return False
        frames = encode(step, id=self._pipeline, epoch=epoch, flags=flags)
        if self._kept is not None:
            self._kept.append((step, flags, frames))
        else:
            self._go(self._lane, frames)
        return True

    def close(self) -> None:
        self.over()
        self._door.close()

    def _arrived(self, frames: list[Any]) -> None:
        try:
            prefix, message = decode(frames)
        except Malformed as error:
            log.warning("a neighbour sent what is no message: %s", error.message)
            with contextlib.suppress(Malformed):
                if self._pipeline != NO_ID and read_prefix(frames[0]).id == self._pipeline:
                    self._broken("a STEP cannot be read")
            return
        if not isinstance(message, Step):
            return
        if prefix.id == self._pipeline:
            self._take(prefix, message)
            return
        if prefix.id in self._past:
            return
        early = self._early.setdefault(prefix.id, [])
        if len(early) < AHEAD:
            early.append((prefix, message))
        while len(self._early) > EARLY:
            del self._early[next(iter(self._early))]

    def _go(self, lane: Lane, frames: list[Any]) -> None:
        lane.send(frames)
        self.sent += 1
        self.bytes += sum(map(len, frames))

    def _met(self, pipeline: bytes) -> None:
        """The next stage is there."""
        if self._pipeline != pipeline or self._kept is None or self._lane is None:
            return
        self._unset()
        kept, self._kept = self._kept, None
        for _, _, frames in kept:
            self._go(self._lane, frames)

    def _not_met(self, reason: str) -> None:
        """Nothing was on its way yet, and nothing is lost."""
        log.warning("steps go through the broker, since the next stage is not reached (%s): see its -o address", reason)
        kept, lane = self._kept, self._lane
        assert kept is not None and lane is not None
        self._kept = self._lane = None
        self._unset()
        lane.close()
        for step, flags, _ in kept:
            self._around(step, flags)

    def _unset(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ended(self, pipeline: bytes, reason: str) -> None:
        def tell() -> None:
            if self._pipeline == pipeline:
                self._broken(reason)

        if self._pipeline != pipeline or self._lane is None:
            return
        if self._kept is not None:
            self._not_met(reason)
        elif self._timer is None:
            self._timer = self._loop.call_later(GRACE, tell)
