"""STEPs straight to the next stage of a pipeline. The broker says where that is; all else stays with it.

Knows doors and lanes, not what a STEP computes. A lane that ends takes its pipeline with it: what was on its way is
lost, and only a replay brings it back.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from ...schema.codec import decode, encode
from ...schema.errors import Malformed, RalmqError
from ...schema.frame import Prefix
from ...schema.keys import key_for
from ...schema.limits import NO_ID
from ...schema.message import Direct, Step
from ..direct.address import is_local, towards
from ..direct.door import Door
from ..direct.lane import Lane

log = logging.getLogger("ralmq.stage")
GRACE: Final = 0.3  # seconds in which the broker may say that a neighbour is gone, before this stage says it
EARLY: Final = 4  # pipelines whose STEPs may come before their FORM: they come by another way
SETTLE: Final = 0.5  # seconds that the FINAL of a sequence may take to the broker after its row is back at the leader


class Ring:
    """The doors of one stage.

    Args:
        url: the broker's address; where it is local, so are all stages, and no port is opened.
        take: prefix and STEP of the pipeline that this stage is in.
        broken: called with the reason when the lane to the next stage has ended.
        address: this machine's, as the neighbours see it; "" for that of the interface that leads to the broker.

    Raises:
        Refused: the address is not this machine's, or none leads to the broker.
    """

    def __init__(
        self, url: str, take: Callable[[Prefix, Any], None], broken: Callable[[str], None], address: str = ""
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._broken = broken
        far = "" if is_local(url) and not address else address or towards(url)
        secure = key_for(url, None, works=True) is not None
        self._door = Door(self._arrived, far=far, secure=secure)
        self._pipeline = NO_ID
        self._lane: Lane | None = None
        self._early: dict[bytes, list[tuple[Prefix, Step]]] = {}
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
        if onward is not None:
            try:
                self._lane = Lane(onward, lambda reason: self._cut(pipeline, reason))
            except RalmqError as error:
                log.warning("steps go through the broker: %s", error.message)
        for prefix, step in self._early.pop(pipeline, ()):
            self._take(prefix, step)

    def over(self) -> None:
        """The pipeline is no more."""
        self._pipeline = NO_ID
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def send(self, step: Step, epoch: int, flags: int = 0) -> bool:
        """Whether it went straight to the next stage. Raises Malformed for what does not fit into a message."""
        if self._lane is None:
            return False
        frames = encode(step, id=self._pipeline, epoch=epoch, flags=flags)
        self._lane.send(frames)
        self.sent += 1
        self.bytes += sum(map(len, frames))
        return True

    def close(self) -> None:
        self.over()
        self._door.close()

    def _arrived(self, frames: list[Any]) -> None:
        try:
            prefix, message = decode(frames)
        except Malformed as error:
            log.warning("a neighbour sent what is no message: %s", error.message)
            return
        if not isinstance(message, Step):
            return
        if prefix.id == self._pipeline:
            self._take(prefix, message)
            return
        self._early.setdefault(prefix.id, []).append((prefix, message))
        while len(self._early) > EARLY:
            del self._early[next(iter(self._early))]

    def _cut(self, pipeline: bytes, reason: str) -> None:
        def tell() -> None:
            if self._pipeline == pipeline:
                self._broken(reason)

        if self._pipeline == pipeline and self._timer is None:
            self._timer = self._loop.call_later(GRACE, tell)
