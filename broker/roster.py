"""Who is connected, what each offers, and whether it still makes progress. Knows no socket; life is told to it."""

from typing import Any

from ..schema.codec import encode
from ..schema.errors import Malformed, Refused
from ..schema.keys import Entry
from ..schema.limits import NO_ID
from ..schema.message import PLEASE, Beat, Bye, Form, Gone, Hello, Welcome
from .limits import Limits
from .pipelines import Pipelines
from .records import Peer, Pipeline, Sent
from .requests import Requests

RESERVED = "ralmq."
IDENTITY = "identity"  # a label
LOST_MOST = 20  # lost workers that are remembered, to be shown


class Roster:
    """All peers by routing id. A peer that announces a known nonce on a new connection replaces the old one."""

    def __init__(self, out: list[Sent], requests: Requests, pipelines: Pipelines, epoch: int, limits: Limits) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.entries: dict[bytes, Entry] = {}  # by routing id, where keys rule
        self._users: dict[str, int] = {}  # number of each key that was seen
        self._by_nonce: dict[bytes, Peer] = {}
        self.gone: dict[bytes, tuple[float, Peer, str]] = {}  # workers lost last, by nonce: when, who, why
        self._out = out
        self._requests = requests
        self._pipelines = pipelines
        self._epoch = epoch
        self._limits = limits

    def hello(self, now: float, key: bytes, hello: Hello) -> None:
        """HELLO: the peer is known from now on, its services are offered, its span may complete a pipeline."""
        offers = bool(hello.services) or hello.span is not None
        if offers and not hello.capacity:
            raise Malformed("a worker needs a capacity of at least 1")
        if hello.services and hello.span is not None:
            raise Malformed("a peer offers services or a span: offer the services from a worker of their own")
        if any(name.startswith(RESERVED) for name in hello.services):
            raise Malformed(f"names that begin with {RESERVED} belong to the broker: choose another")
        entry, user = self._user(key, hello)
        known = self.peers.get(key)
        if known is None or known.hello != hello:
            namesake = self._by_nonce.get(hello.nonce)
            if namesake is not None and namesake.user != user:
                raise Malformed("this nonce belongs to a peer with another key: draw another")
            for old in (known, namesake):
                if old is not None and self.peers.get(old.key) is old:
                    self.lose(now, old, "announced itself anew")
            self._check_identity(hello)
        self._tell(key, Welcome(beat_ms=int(self._limits.beat * 1000), name=hello.name))
        if key not in self.peers:
            self._add(now, Peer(key, hello, hello.name, now, hello.capacity, progress_at=now, user=user, entry=entry))

    def bye(self, now: float, peer: Peer) -> None:
        """BYE: a client is forgotten; a worker gets no new work, and BYE back once nothing of it is open."""
        peer.draining = True
        if not peer.works:
            self.lose(now, peer, "left")
            return
        owner = peer.owner
        owner.leaving = True
        self._stop_offering(owner)
        self._requests.feed(now, owner)  # not it: another is kept for a suspect that waited for it
        self.left(now, owner)

    def named(self, beginning: str) -> list[Peer]:
        """The workers whose names begin so, or the one of that name."""
        workers = [peer for peer in self.peers.values() if peer.works]
        found = [peer for peer in workers if peer.name == beginning]
        return found or [peer for peer in workers if peer.name.startswith(beginning)]

    def ask_to_leave(self, worker: Peer) -> None:
        """BYE to a worker that did not say so: it is to drain. It answers with BYE of its own, as after a signal."""
        self._out.append((worker.key, encode(Bye(), attempt=PLEASE, epoch=self._epoch)))

    def left(self, now: float, worker: Peer) -> None:
        """Something of this worker ended: if it, or a stage of its pipeline, drains and nothing is open, it may go."""
        if worker.load or self.peers.get(worker.key) is not worker:
            return
        worker.leaving = False
        pipeline = worker.pipeline
        leaving = [stage for stage in (pipeline.stages if pipeline else [worker]) if stage.draining]
        if leaving and pipeline is not None:
            self._dissolve(now, pipeline, "a stage is drained")
            return  # which puts each draining stage back here, now without a pipeline
        for stage in leaving:
            self._tell(stage.key, Bye())
            self._requests.lose_asker(now, stage)
            self._forget(now, stage)

    def lose(self, now: float, peer: Peer, reason: str) -> None:
        """The peer is dead, cut off or hung: what it asked is abandoned, what it served goes on elsewhere or fails."""
        pipeline = peer.pipeline
        if peer.works:
            self.gone[peer.hello.nonce] = now, peer, reason
            if len(self.gone) > LOST_MOST:
                del self.gone[next(iter(self.gone))]
        self._requests.lose_asker(now, peer)
        if pipeline is not None:
            self._stop_offering(pipeline.leader)
            self._requests.lose_worker(now, pipeline.leader, f"lost {peer.name}, which {reason}", peer)
            self._dissolve(now, pipeline, "a stage is lost", gone=peer)
        elif peer.works:
            self._stop_offering(peer)
        self._requests.lose_worker(now, peer, reason, peer)
        self._forget(now, peer)

    def beat(self, now: float, peer: Peer, beat: Beat) -> None:
        """BEAT: progress is a count that moved, or nothing in hand."""
        if beat.progress != peer.progress or not beat.busy:
            peer.progress, peer.progress_at = beat.progress, now
        peer.busy = beat.busy
        peer.gauges = beat.gauges
        self._requests.reconcile(now, peer, beat.active, beat.heard)

    def hung(self, now: float) -> None:
        """Workers that have work and no progress past their stall limit are treated as lost, and told so.

        A stage has work while its pipeline has. The one that stands still longest goes first: the others of its
        pipeline may only have waited for it.
        """
        for peer in sorted(self.peers.values(), key=lambda peer: peer.progress_at):
            if not peer.owner.load and not peer.busy:
                peer.progress_at = now  # its work, when it comes, came at most one interval later
            elif now - peer.progress_at > peer.hello.stall_ms / 1000 + self._limits.beat:
                self._tell(peer.key, Gone("no progress past the stall limit"))
                self.lose(now, peer, "made no progress past its stall limit")

    # -- inside

    def _user(self, key: bytes, hello: Hello) -> tuple[Entry | None, int]:
        """What the key of a connection allows, and its number; where keys do not rule nothing is refused."""
        entry = self.entries.get(key)
        if entry is None:
            return None, 0
        offers = [*hello.services, *([f"lm:{hello.span.model}"] if hello.span is not None else [])]
        refused = [name for name in offers if not entry.may_offer(name)]
        if refused:
            self._requests.counts["forbidden"] += 1
            text = f"the key {entry.name} ({entry.role}) may not offer {', '.join(refused)}"
            raise Refused(f"{text}: make one with `ralmq keys add NAME --role worker`")
        return entry, self._users.setdefault(entry.public, len(self._users) + 1)

    def _check_identity(self, hello: Hello) -> None:
        """Workers of one service answer alike: one that says it serves something else is no replica of them.

        Who says nothing of it is no rival of anybody, nor is who drains. An earlier self of this peer is gone by now.
        """
        own = _identity(hello)
        for name in hello.services:
            service = self._requests.services.get(name)
            for rival in service.workers if service is not None else ():
                other = _identity(rival.hello)
                if own and other and other != own:
                    self._requests.counts["other_identity"] += 1
                    raise Refused(
                        f"{name} is served by {rival.name}, which is another ({other}; this one: {own}): "
                        "give this one a name of its own with -o name=, or stop the other first"
                    )

    def _add(self, now: float, peer: Peer) -> None:
        self.peers[peer.key] = peer
        self.gone.pop(peer.hello.nonce, None)
        self._by_nonce[peer.hello.nonce] = peer
        for name in peer.hello.services:
            service = self._requests.service(name)
            service.offers += 1
            service.workers.append(peer)
            peer.services.append(service)
        span = peer.hello.span
        if span is not None:
            service = self._requests.service(f"lm:{span.model}")
            service.offers += 1
            peer.services.append(service)
            self._formed(now, self._pipelines.add(peer))
        self._requests.feed(now, peer)

    def _forget(self, now: float, peer: Peer) -> None:
        del self.peers[peer.key]
        del self._by_nonce[peer.hello.nonce]
        for service in peer.services:
            service.offers -= 1
            if not service.offers:
                self._requests.withdrawn(now, service)
        if peer.hello.span is not None:
            self._formed(now, self._pipelines.remove(peer))

    def _stop_offering(self, peer: Peer) -> None:
        for service in peer.services:
            if peer in service.workers:
                service.workers.remove(peer)

    def _formed(self, now: float, pipelines: list[Pipeline]) -> None:
        for pipeline in pipelines:
            blocks = min(span.kv_blocks for span in pipeline.spans)
            rows = min(span.max_rows for span in pipeline.spans)
            for place, stage in enumerate(pipeline.stages):
                following = pipeline.stages[(place + 1) % len(pipeline.stages)]
                straight = stage.hello.direct is not None and following is not stage
                onward = following.hello.direct if straight else None
                form = Form(pipeline.model, place, len(pipeline.stages), blocks, rows, onward)
                self._tell(stage.key, form, pipeline.id)
            service = self._requests.service(f"lm:{pipeline.model}")
            service.workers.append(pipeline.leader)
            self._requests.feed(now, pipeline.leader)

    def _dissolve(self, now: float, pipeline: Pipeline, reason: str, gone: Peer | None = None) -> None:
        """Ends a pipeline; its survivors drop their KV cache and are spares until the layers are covered again."""
        self._stop_offering(pipeline.leader)
        pipeline.leader.leaving = False
        self._pipelines.dissolve(pipeline)
        for stage in pipeline.stages:
            if stage is gone:
                continue
            self._tell(stage.key, Gone(reason), pipeline.id)
            stage.busy, stage.progress_at = 0, now
            if stage.draining:
                self._requests.left.append(stage)

    def _tell(self, key: bytes, message: Any, identity: bytes = NO_ID) -> None:
        self._out.append((key, encode(message, id=identity, epoch=self._epoch)))


def _identity(hello: Hello) -> str:
    """What a worker says that it serves, in its label `identity`; empty where it says nothing."""
    return str(hello.labels.get(IDENTITY) or "")
