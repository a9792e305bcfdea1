"""A stage that has not been told its layers: what it says of itself, and how it asks the broker. Loads nothing."""

import asyncio
import contextlib
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from ...client.client import Client
from ...schema.errors import DeadlineExceeded, RalmqError, Refused
from ...schema.keys import PLACE
from ...schema.plan.model import Load
from ...schema.plan.plan import KV_TOKENS
from ...schema.plan.sizes import read_size, size_text
from ..base import Hosting
from ..engine.errors import CheckpointError
from ..engine.headers import Headers
from ..speed import measured
from ..weigh import weighed
from .ranks import check_device
from .weights import Place

log = logging.getLogger("ralmq.stage")
AUTO: Final = "auto"
SHARE: Final = 0.8  # of the memory that is free, where none is given
DEADLINE: Final = 10.0  # seconds of one question
LAST: Final = 1.0  # and of the last one, when the layers are loaded
CGROUP: Final = Path("/sys/fs/cgroup")
PATIENT: Final = float("inf")  # a broker that is away is waited for, as by every worker


@dataclass(frozen=True, slots=True)
class Offer:
    """What a stage offers when it asks for layers: `of` is how many stages will ask, 0 for unknown."""

    of: int
    memory: str
    speed: float
    kv_tokens: int
    device: str
    dtype: str

    @classmethod
    def read(
        cls, stage: str, memory: str, speed: float, kv_tokens: int, device: str, dtype: str, *, alone: bool
    ) -> "Offer | None":
        """None where the stage is told its layers; `alone`: it computes in one process, and by no fixed calls.

        Raises:
            Refused: options that do not go together, or a value that is none.
        """
        word, slash, number = stage.partition("/")
        given = [name for name, value in (("memory", memory), ("speed", speed), ("kv_tokens", kv_tokens)) if value]
        if word != AUTO:
            if given:
                raise Refused(f"-o {given[0]} is for stage=auto: this stage is told its layers, leave it away")
            return None
        if not alone:
            raise Refused("stage=auto does not go with tp or deterministic: tell the stage its layers")
        if slash and not (number.isdecimal() and int(number) > 0):
            raise Refused(f"stage={stage} is not of the form auto or auto/3, of three that are to come")
        if speed < 0 or kv_tokens < 0:
            raise Refused("speed and kv_tokens are numbers above 0: GB/s, and tokens of the cache")
        if memory:
            read_size(memory)
        return cls(int(number or 0), memory, speed, kv_tokens or KV_TOKENS, device, dtype)


@dataclass(frozen=True, slots=True)
class Settled:
    """Which layers a stage is to load, what that changes of its other options, and what its HELLO says of it."""

    place: Place
    options: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def settled(place: Place, offer: Offer | None, host: Callable[[], Hosting]) -> AsyncIterator[Settled]:
    """The layers that a stage is told, or that the broker gives it and keeps for it as long as the block lasts.

    Raises:
        Refused: see `Placing`.
    """
    if offer is None:
        yield Settled(place)
        return
    placing = await asyncio.to_thread(Placing.of, place, offer)
    async with placing.placed(host()) as given:
        yield Settled(given, {"kv_mib": placing.kv_mib(given)}, placing.labels)


@dataclass(frozen=True, slots=True)
class Placing:
    """A stage that asks: who it is, and its question."""

    place: Place
    offer: Offer
    question: dict[str, Any]

    @classmethod
    def of(cls, place: Place, offer: Offer) -> "Placing":
        """Weighs the model and measures the device; takes about a second.

        Raises:
            Refused: the checkpoint is broken or a part of one, or the device is not there.
        """
        check_device(offer.device)
        try:
            sizes = weighed(place.path, place.name, offer.dtype)
            fingerprint = Headers(place.path).fingerprint()
        except CheckpointError as error:
            raise Refused(str(error)) from None
        try:
            speed = offer.speed or measured(offer.device)
            memory = read_size(offer.memory) if offer.memory else int(SHARE * _free(offer.device))
        except (RuntimeError, AssertionError) as error:  # torch's own word on a device that is not there
            raise Refused(f"device={offer.device} cannot be used: {str(error).splitlines()[0]}") from None
        log.info("offers %s of memory, %.3g GB/s", size_text(memory), speed)
        question = {
            "who": secrets.token_hex(8),
            "sizes": sizes.as_map(),
            "fingerprint": fingerprint,
            "memory": memory,
            "speed": speed,
            "device": offer.device,
            "kv_tokens": offer.kv_tokens,
            "of": offer.of,
        }
        return cls(place, offer, question)

    @property
    def labels(self) -> dict[str, Any]:
        """Of its HELLO."""
        return {"place": self.question["who"], "speed": round(self.question["speed"], 2), "device": self.offer.device}

    def kv_mib(self, place: Place) -> int:
        """Memory for keys and values of these layers."""
        load = Load(weighed(place.path, place.name, self.offer.dtype), self.offer.kv_tokens)
        return load.kv_mib(place.first, place.last)

    @asynccontextmanager
    async def placed(self, host: Hosting) -> AsyncIterator[Place]:
        """The layers that the broker gives; they are kept for this stage as long as the block lasts.

        Raises:
            Refused: the broker knows no such question, or refuses it.
        """
        async with host.asking(PATIENT) as client:
            given = await self._given(client)
            place = replace(self.place, first=given["first"], last=given["last"])
            log.info("takes layers %d-%d: %s", place.first, place.last - 1, given["why"])
            keeping = asyncio.create_task(self._keep(client, given))
            try:
                yield place
                await self._ask_on(client, given, LAST)  # kept until it is announced, over another connection
            finally:
                keeping.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await keeping

    async def _given(self, client: Client) -> dict[str, Any]:
        said = ""
        while True:
            try:
                answer = (await client.request(PLACE, self.question, deadline=DEADLINE, retries=3)).body
            except DeadlineExceeded:  # the broker is away: it is waited for
                continue
            if "first" in answer:
                return answer
            if answer["why"] != said:
                log.info("%s", said := answer["why"])
            await asyncio.sleep(answer["wait"])

    async def _keep(self, client: Client, given: dict[str, Any]) -> None:
        """Asks again within each lease, also a broker that was started anew."""
        while True:
            await asyncio.sleep(given["lease"] / 4)
            await self._ask_on(client, given, given["lease"] / 2)

    async def _ask_on(self, client: Client, given: dict[str, Any], deadline: float) -> None:
        held = {**self.question, "held": [given["first"], given["last"]]}
        with contextlib.suppress(RalmqError):  # the broker is away: the next question may reach it
            await client.request(PLACE, held, deadline=deadline)


def _free(device: str) -> int:
    """Bytes of memory that nobody uses."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return min(int(rest.split()[0]) << 10, _allowed(CGROUP))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allowed(group: Path) -> int:
    """Bytes that a container may take still: /proc/meminfo is of the whole machine."""
    try:
        most, now = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(most) - int(now))
    except (OSError, ValueError):  # no such group, or "max"
        return sys.maxsize
