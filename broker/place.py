"""Which layers a stage that joins is to take: it asks again and again, and is given a lease. Knows sizes; no frames.

Nothing is decided for one while others may join: those who wait are planned together, by the planner of `ralmq plan`.
The answer is soft state; who loads repeats what it was given, so that a new broker knows it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as Layers
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeGuard

from ..schema.errors import Refused
from ..schema.frame import Prefix
from ..schema.keys import PLACE
from ..schema.limits import MAX_NAME
from ..schema.plan.model import Load, Model, model_of
from ..schema.plan.sizes import size_text
from ..schema.plan.slots import FASTEST, SLOWEST, Slot, with_speeds
from ..schema.plan.spans import Task, best_spans
from .pipelines import Pipelines
from .records import Peer
from .requests import Requests
from .roster import Roster

LEASE: Final = 10.0  # seconds without a word from one that was given layers
SILENT: Final = 3.0  # and from one that waits for some, or has loaded and closes this connection for another one
SETTLE: Final = 2.0  # seconds without a newcomer after which those who wait are planned, where none says how many come
AGAIN: Final = 0.5  # seconds until the next question of one who waits
MOST_LAYERS: Final = 256
MOST_CLAIMS: Final = 64  # of all models
STATES: Final = 1 << 10  # sets of devices that are searched exactly: the broker has other work to do
LABEL: Final = "place"  # of a stage's HELLO: who it was when it asked

Group = tuple[str, str, int]  # model, fingerprint, layers
Spans = list[tuple[int, int]]  # first and last (exclusive) layers


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
        self._tried: dict[Group, tuple[set[str], Spans]] = {}  # those who got nothing, and the spans that there were
        requests.builtins[PLACE] = self._ask

    def _ask(self, now: float, asker: Peer, prefix: Prefix, body: dict[str, Any]) -> dict[str, Any]:
        """Answers {first, last, lease, why}, or {wait, why} with the seconds until it is to ask again."""
        self._end(now)
        claim = self._claim(now, asker, body)
        groups = {claim.group for claim in self._claims.values()}
        self._tried = {group: tried for group, tried in self._tried.items() if group in groups}
        if not claim.placed:
            self._decide(now, claim.group)
        if not claim.placed:
            return {"wait": AGAIN, "why": claim.why}
        return {"first": claim.first, "last": claim.last, "lease": LEASE, "why": claim.why}

    def _end(self, now: float) -> None:
        """Forgets those who are there by now, and those of whom nothing was heard for too long."""
        announced = {str(stage.hello.labels[LABEL]) for stage in self._pipelines.stages() if _asked(stage)}
        for claim in list(self._claims.values()):
            there = self._roster.peers.get(claim.asker.key) is claim.asker
            patience = LEASE if there and claim.placed else SILENT
            lost = not there and not claim.placed
            if lost or now - claim.seen > patience or claim.who in announced:
                del self._claims[claim.who]

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
        spans = self._spans(group)
        if here < expected and not spans:
            return _tell(waiting, f"waits for the other stages: {here} of {expected} are here")
        if here >= expected > 0 or now - max(claim.since for claim in waiting) >= SETTLE:
            return self._give(now, claims, spans, group)
        return _tell(waiting, "waits whether others join")

    def _give(self, now: float, claims: Sequence[Claim], spans: Spans, group: Group) -> None:
        """Layers that nobody has; else those of others, which takes until nobody loads.

        Then a lease must have ended meanwhile, too: what loads, or one of those who wait loaded before it failed, may
        leave layers free. What was tried with the same stages is not tried again.
        """
        held = {layer for first, last in spans for layer in range(first, last)}
        waiting = [claim for claim in claims if not claim.placed]
        if len(held) == group[2]:
            loading = len(waiting) < len(claims)
            waiting = [claim for claim in waiting if not loading and now - claim.since > LEASE]
        state = {claim.who for claim in waiting}, sorted(spans)
        if not waiting or self._tried.get(group) == state:
            return
        if len(held) < group[2]:
            _fill(waiting, group[2], held)
        else:
            _stand_in(waiting, spans, group[2])
        if not any(claim.placed for claim in waiting):
            self._tried[group] = state

    def _spans(self, group: Group) -> Spans:
        """Of the stages that are there, and of those that load."""
        stages = [stage for stage in self._pipelines.stages() if _of(stage, group) and not stage.draining]
        spans = [(span.first, span.last) for stage in stages if (span := stage.hello.span) is not None]
        return spans + [(c.first, c.last) for c in self._claims.values() if c.group == group and c.placed]


def _fill(waiting: Sequence[Claim], layers: int, held: Layers[int] = frozenset()) -> None:
    """Splits layers that nobody has over those who wait; they are told what is missing where they do not fit."""
    free = [layer for layer in range(layers) if layer not in held]
    gaps = [(a, b) for a, b in pairwise([-1, *sorted(held), layers]) if b - a > 1]
    first, last = free[0], free[-1] + 1
    where = ", ".join(f"{before + 1}-{after - 1}" for before, after in gaps)
    load = Load(waiting[0].model, max(claim.kv_tokens for claim in waiting))
    slots = with_speeds([claim.slot for claim in waiting])
    spans = best_spans(Task(load, slots, first, last, held=frozenset(held)), STATES)
    if spans is None:
        memory = size_text(sum(slot.memory for slot in slots))
        need = size_text(sum(load.memory(before + 1, after) for before, after in gaps))
        return _tell(waiting, f"layers {where} need {need} of memory, those who wait have {memory}: add a worker")
    for span in spans:
        claim = waiting[span.slot]
        claim.first, claim.last = span.first, span.last
        claim.why = f"the fastest split of layers {where} over {len(slots)}"
    return None


def _stand_in(waiting: Sequence[Claim], spans: Spans, layers: int) -> None:
    """Nothing is missing: a second pipeline where they can hold one, else each takes the place of a stage, too."""
    _fill(waiting, layers)
    for claim in waiting:
        if claim.placed:
            continue
        load = Load(claim.model, claim.kv_tokens)
        fit = [span for span in spans if load.memory(*span) <= claim.slot.memory]
        if fit:
            claim.first, claim.last = min(fit, key=lambda span: (fit.count(span), span[0] - span[1]))
            spans.append((claim.first, claim.last))
            claim.why = "every layer has a stage: it stands by for one of them"
        else:
            claim.why = "every layer has a stage, and no stage's layers fit its memory"


def _tell(waiting: Sequence[Claim], why: str) -> None:
    for claim in waiting:
        claim.why = why


def _of(stage: Peer, group: Group) -> bool:
    span = stage.hello.span
    return span is not None and (span.model, span.fingerprint, span.layers) == group


def _asked(stage: Peer) -> bool:
    return LABEL in stage.hello.labels


def _short(text: Any) -> TypeGuard[str]:
    return isinstance(text, str) and 0 < len(text) <= 64


def _read(now: float, asker: Peer, body: dict[str, Any]) -> Claim:
    model = model_of(body.get("sizes"))
    who, fingerprint, kv_tokens, of = (body.get(name) for name in ("who", "fingerprint", "kv_tokens", "of"))
    memory, speed, held = (body.get(name) for name in ("memory", "speed", "held"))
    if not 0 < len(model.name) <= MAX_NAME:
        raise Refused(f"a model's name has 1 to {MAX_NAME} characters: give name=")
    if asker.entry is not None and not asker.entry.may_offer(service := f"lm:{model.name}"):
        raise Refused(f"the key {asker.entry.name} ({asker.entry.role}) may not offer {service}: use another key")
    if len(model.layers) > MOST_LAYERS:
        raise Refused(f"{model.name} has {len(model.layers)} layers, {MOST_LAYERS} may be placed: give layers=")
    if not _short(who) or not _short(fingerprint):
        raise Refused("who asks for layers gives itself a name, and the model's fingerprint")
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in (memory, kv_tokens, of)):
        raise Refused("memory, kv_tokens and of are whole numbers: bytes, tokens, stages")
    if not isinstance(speed, int | float) or not (speed == 0 or SLOWEST <= speed <= FASTEST):
        raise Refused(f"speed is {SLOWEST:g} to {FASTEST:g} GB/s, or 0 where it is not known")
    group = (model.name, fingerprint, len(model.layers))
    slot = Slot(asker.name, memory or 0, float(speed), str(body.get("device", "cpu"))[:32])
    claim = Claim(who, asker, group, model, slot, kv_tokens or 0, of or 0, now, now)
    if isinstance(held, list) and len(held) == 2 and all(type(n) is int for n in held):
        first, last = held
        if 0 <= first < last <= len(model.layers):  # an earlier broker gave it these
            claim.first, claim.last, claim.why = first, last, "held already"
    return claim
