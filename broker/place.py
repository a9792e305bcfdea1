"""Which layers a stage that joins is to take: it asks again and again, and is given a lease. Knows sizes; no frames.

Nothing is decided for one while others may join: those who wait are planned together, by the planner of `ralmq plan`.
The answer is soft state; who loads repeats what it was given, so that a new broker knows it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..schema.errors import Refused
from ..schema.frame import Prefix
from ..schema.keys import PLACE
from ..schema.plan.model import Load, Model, model_of
from ..schema.plan.plan import fitting
from ..schema.plan.sizes import size_text
from ..schema.plan.slots import Slot
from ..schema.plan.spans import Task, best_spans
from .pipelines import Pipelines
from .records import Peer
from .requests import Requests
from .roster import Roster

LEASE: Final = 10.0  # seconds without a word from one that was given layers
SILENT: Final = 3.0  # and from one that waits for some, or whose connection has ended: it has loaded, or failed
SETTLE: Final = 2.0  # seconds without a newcomer after which those who wait are planned, where none says how many come
AGAIN: Final = 0.5  # seconds until the next question of one who waits
MOST_LAYERS: Final = 512
MOST_CLAIMS: Final = 64  # of all models
STATES: Final = 1 << 10  # sets of devices that are searched exactly: the broker has other work to do
LABEL: Final = "place"  # of a stage's HELLO: who it was when it asked

Group = tuple[str, str, int]  # model, fingerprint, layers
Gaps = list[tuple[int, int]]  # layers that nobody has


@dataclass(slots=True, eq=False)
class Claim:
    """One that asked. `first` is below `last` once it was given layers; `of`: how many there will be, 0: unknown."""

    who: str
    asker: Peer
    group: Group
    model: Model
    slot: Slot
    kv_tokens: int
    of: int
    since: float
    seen: float
    first: int = 0
    last: int = 0
    why: str = ""

    @property
    def placed(self) -> bool:
        return self.first < self.last


class Places:
    """The service `ralmq.place`; see `Claim` for what is asked, docs/cluster.md for the rules."""

    def __init__(self, requests: Requests, roster: Roster, pipelines: Pipelines) -> None:
        self._roster = roster
        self._pipelines = pipelines
        self._claims: dict[str, Claim] = {}
        self._tried: dict[Group, tuple[set[str], Gaps]] = {}  # those who did not fit together, and where
        requests.builtins[PLACE] = self._ask

    def _ask(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any]:
        """Answers {first, last, lease, why}, or {wait, why} with the seconds until it is to ask again."""
        announced = {str(stage.hello.labels.get(LABEL)) for stage in self._pipelines.stages()}
        for claim in list(self._claims.values()):
            loads = claim.placed and self._roster.peers.get(claim.asker.key) is claim.asker
            if now - claim.seen > (LEASE if loads else SILENT) or claim.who in announced:
                del self._claims[claim.who]
        claim = self._claim(now, asker, body)
        groups = {claim.group for claim in self._claims.values()}
        self._tried = {group: tried for group, tried in self._tried.items() if group in groups}
        if not claim.placed:
            self._decide(now, claim.group)
        if not claim.placed:
            return {"wait": AGAIN, "why": claim.why}
        return {"first": claim.first, "last": claim.last, "lease": LEASE, "why": claim.why}

    def _claim(self, now: float, asker: Peer, body: dict[str, Any]) -> Claim:
        fresh = _read(now, asker, body)
        known = self._claims.get(fresh.who)
        if known is None and len(self._claims) >= MOST_CLAIMS:
            raise Refused(f"{MOST_CLAIMS} stages wait for layers already: start this one later, or with layers=")
        if known is not None and known.asker.user != asker.user:
            raise Refused("this stage has asked with another key: draw another name for it")
        if known is not None and known.group == fresh.group:
            fresh.since, fresh.why = known.since, known.why
            if known.placed:
                fresh.first, fresh.last = known.first, known.last
        self._claims[fresh.who] = fresh
        return fresh

    def _decide(self, now: float, group: Group) -> None:
        """Gives layers to those who wait, where it is time for that."""
        claims = [claim for claim in self._claims.values() if claim.group == group]
        waiting = [claim for claim in claims if not claim.placed]
        expected = max(claim.of for claim in waiting)
        here = len(claims) + sum(_of(stage, group) and _asked(stage) for stage in self._pipelines.stages())
        if here < expected:
            return _tell(waiting, f"waits for the other stages: {here} of {expected} are here")
        if not expected and now - max(claim.since for claim in waiting) < SETTLE:
            return _tell(waiting, "waits whether others join")
        gaps = self._gaps(group)
        state = {claim.who for claim in claims}, gaps
        if self._tried.get(group) == state:
            return None
        for first, last in gaps:
            self._fill(waiting, first, last)
            waiting = [claim for claim in waiting if not claim.placed]
        if not gaps:
            if not any(claim.placed for claim in claims):
                self._stand_in(now, waiting, group)
        elif waiting:
            self._tried[group] = state
        return None

    def _fill(self, waiting: Sequence[Claim], first: int, last: int) -> None:
        """Splits layers that nobody has over those who wait; they are told what is missing where they do not fit."""
        if not waiting:
            return
        load = Load(waiting[0].model, max(claim.kv_tokens for claim in waiting))
        speeds = [claim.slot.speed for claim in waiting if claim.slot.speed]
        common = sum(speeds) / len(speeds) if speeds else 1.0
        slots = [replace(claim.slot, speed=claim.slot.speed or common) for claim in waiting]
        spans = best_spans(Task(load, slots, first, last), STATES)
        if spans is None:
            memory = size_text(sum(slot.memory for slot in slots))
            need = size_text(load.memory(first, last))
            _tell(
                waiting, f"layers {first}-{last - 1} need {need} of memory, those who wait have {memory}: add a worker"
            )
            return
        for span in spans:
            claim = waiting[span.slot]
            claim.first, claim.last = span.first, span.last
            claim.why = f"the fastest split of layers {first}-{last - 1} over {len(slots)}"

    def _stand_in(self, now: float, waiting: Sequence[Claim], group: Group) -> None:
        """Nothing is missing: a second pipeline where they can hold one, else each takes the place of a stage, too.

        Nobody may be loading, and a lease must have ended meanwhile: what loads, or one of those who wait loaded before
        it failed, may leave layers free.
        """
        waiting = [claim for claim in waiting if now - claim.since > LEASE]
        self._fill(waiting, 0, group[2])
        for claim in waiting:
            if claim.placed:
                continue
            load = Load(claim.model, claim.kv_tokens)
            spans = [
                (first, last) for first, last in self._spans(group) if fitting(load, claim.slot, first, last) == last
            ]
            if spans:
                held = {span: spans.count(span) for span in spans}
                claim.first, claim.last = min(held, key=lambda span: (held[span], span[0] - span[1]))
                claim.why = "every layer has a stage: it stands by for one of them"
            else:
                claim.why = "every layer has a stage, and no stage's layers fit its memory"

    def _spans(self, group: Group) -> list[tuple[int, int]]:
        """Of the stages that are there, and of those that load."""
        stages = [stage for stage in self._pipelines.stages() if _of(stage, group) and not stage.draining]
        spans = [(span.first, span.last) for stage in stages if (span := stage.hello.span) is not None]
        return spans + [(c.first, c.last) for c in self._claims.values() if c.group == group and c.placed]

    def _gaps(self, group: Group) -> Gaps:
        covered = {layer for first, last in self._spans(group) for layer in range(first, last)}
        gaps: Gaps = []
        for layer in range(group[2]):
            if layer in covered:
                continue
            if gaps and gaps[-1][1] == layer:
                gaps[-1] = gaps[-1][0], layer + 1
            else:
                gaps.append((layer, layer + 1))
        return gaps


def _tell(waiting: Sequence[Claim], why: str) -> None:
    for claim in waiting:
        claim.why = why


def _of(stage: Peer, group: Group) -> bool:
    span = stage.hello.span
    return span is not None and (span.model, span.fingerprint, span.layers) == group


def _asked(stage: Peer) -> bool:
    return LABEL in stage.hello.labels


def _read(now: float, asker: Peer, body: dict[str, Any]) -> Claim:
    model = model_of(body.get("sizes"))
    who, fingerprint, kv_tokens, of = (body.get(name) for name in ("who", "fingerprint", "kv_tokens", "of"))
    memory, speed, held = (body.get(name) for name in ("memory", "speed", "held"))
    if len(model.layers) > MOST_LAYERS:
        raise Refused(f"{model.name} has {len(model.layers)} layers, {MOST_LAYERS} may be placed: give layers=")
    if not isinstance(who, str) or not 0 < len(who) <= 64 or not isinstance(fingerprint, str):
        raise Refused("who asks for layers gives itself a name, and the model's fingerprint")
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in (memory, kv_tokens, of)):
        raise Refused("memory, kv_tokens and of are whole numbers: bytes, tokens, stages")
    if not isinstance(speed, int | float) or not 0 <= speed < 1e9:
        raise Refused("speed is a number of GB/s, 0 where it is not known")
    group = (model.name, fingerprint, len(model.layers))
    slot = Slot(asker.name, memory or 0, float(speed), str(body.get("device", "cpu"))[:32])
    claim = Claim(who, asker, group, model, slot, kv_tokens or 0, of or 0, now, now)
    if isinstance(held, list) and len(held) == 2 and all(type(n) is int for n in held):
        first, last = held
        if 0 <= first < last <= len(model.layers):  # an earlier broker gave it these
            claim.first, claim.last, claim.why = first, last, "held already"
    return claim
