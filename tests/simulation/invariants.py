"""What must hold of a broker's core after every step, and what must be left of it when nothing is under way."""

from collections import Counter

from ralmq.broker.core import Core
from ralmq.broker.limits import RECORD
from ralmq.broker.pipelines import Pipelines
from ralmq.broker.records import Peer, Record, State
from ralmq.broker.requests import serves
from ralmq.schema.message import Span

QUEUED, RUNNING = State.QUEUED, State.RUNNING


class Broken(AssertionError):
    """An invariant does not hold."""


def holds(condition: bool, text: str, what: Record | Peer | bytes | None = None) -> None:
    """Raises Broken where the condition is false; `what` is it about."""
    if condition:
        return
    name = ""
    if isinstance(what, Record):
        name = f"{what.service.name} {what.id.hex()[:6]}/{what.attempt} leg {what.leg}: "
    elif what is not None:
        name = f"{what.hex()[:6] if isinstance(what, bytes) else what.name}: "
    raise Broken(f"{name}{text}")


def invariants(core: Core) -> None:
    """Checks the whole state of a core between two steps.

    Raises:
        Broken: which rule does not hold.
    """
    holds(not core._out, "messages were left unsent")
    holds(not core.requests.left, "a leaving worker was left waiting")
    for record in core.requests.open.values():
        _record(core, record)
    for peer in core.roster.peers.values():
        _peer(core, peer)
    _tables(core)
    _queues(core)
    _pipelines(core.pipelines)


def touched(core: Core, key: bytes, identity: bytes) -> None:
    """Checks the peer that a message came from, and the request that it is about: the cheap part, for each step.

    Raises:
        Broken: which rule does not hold.
    """
    peer = core.roster.peers.get(key)
    if peer is not None:
        count = len(peer.serving) + len(peer.ending)
        if peer.load != count or count > peer.hello.capacity or peer.alone > (count == 1):
            holds(False, "its load is not the number of requests that spend its credit, or too much", peer)
    record = core.requests.open.get(identity)
    if record is not None:
        worker = record.worker
        if record.state is QUEUED:
            right = worker is None
        else:
            right = worker is not None and worker.serving.get(identity) is record and record.state is RUNNING
        if not right or record.asker.asked.get(identity) is not record:
            holds(False, "is not where its state says", record)
    if core.requests.queued_bytes < 0:
        holds(False, "bytes in the queues are counted wrong", peer)


def quiescent(core: Core) -> None:
    """Checks that a core with nothing under way holds nothing.

    Raises:
        Broken: what was left.
    """
    requests = core.requests
    holds(not requests.open, f"{len(requests.open)} requests never ended")
    holds(not requests.queued_bytes, f"{requests.queued_bytes} queued bytes were left")
    for peer in core.roster.peers.values():
        held = (peer.load, len(peer.serving), len(peer.ending), len(peer.asked), peer.held)
        holds(held == (0, 0, 0, 0, 0), f"{peer.name} kept load, serving, ending, asked, bytes = {held}")
    for service in requests.services.values():
        holds(service.kept is None, f"{service.name} keeps a worker for nothing")
        holds(bool(service.offers), f"the name {service.name} was kept, but nobody offers it")


def _record(core: Core, record: Record) -> None:
    requests, peers = core.requests, core.roster.peers
    holds(requests.open[record.id] is record, "is filed under another id", record)
    holds(peers.get(record.asker.key) is record.asker, "its asker is gone", record)
    holds(record.asker.asked.get(record.id) is record, "is unknown to its asker", record)
    holds(requests.services.get(record.service.name) is record.service, "its service is forgotten", record)
    worker = record.worker
    if record.state is State.QUEUED:
        holds(worker is None, "is queued and has a worker", record)
    else:
        holds(record.state is State.RUNNING and worker is not None, "is open without a place", record)
        assert worker is not None
        holds(peers.get(worker.key) is worker, "its worker is gone", record)
        holds(worker.serving.get(record.id) is record, "is unknown to its worker", record)
    parent = record.parent
    if parent is not None:
        holds(requests.open.get(parent.id) is parent, "its parent is over", record)
        holds((parent.children or {}).get(record.id) is record, "is unknown to its parent", record)
        holds(serves(record.asker, parent), "its asker does not serve its parent", record)
        late = parent.deadline and not 0 < record.deadline <= parent.deadline
        holds(not late, "may outlive its parent", record)
    for child in (record.children or {}).values():
        holds(requests.open.get(child.id) is child and child.parent is record, "has a stray child", record)


def _peer(core: Core, peer: Peer) -> None:
    holds(core.roster.peers[peer.key] is peer, "is filed under another key", peer)
    holds(core.roster._by_nonce.get(peer.hello.nonce) is peer, "its nonce leads elsewhere", peer)
    count = len(peer.serving) + len(peer.ending)
    holds(peer.load == count, "its load is not the number of requests that spend its credit", peer)
    holds(peer.load <= peer.hello.capacity, "more requests than its capacity", peer)
    suspects = [record for record in peer.serving.values() if record.losses]
    holds(peer.alone <= (count == 1), "has a suspect, and something beside it", peer)
    holds(not suspects or (peer.alone and count == 1), "has a suspect beside something else", peer)
    keepers = [service for service in core.requests.services.values() if service.kept is peer]
    holds(peer.kept == len(keepers), "is kept by other services than it counts", peer)
    holds(all(service.suspects for service in keepers), "is kept for no suspect", peer)
    right = 1 if peer.alone else 0 if peer.kept else peer.hello.capacity
    holds(peer.capacity == right, f"takes {peer.capacity}, expected {right}", peer)
    bytes_held = sum(record.size for record in peer.asked.values())
    holds(peer.held == bytes_held, f"is charged with {peer.held} bytes, {bytes_held} are held", peer)
    for identity, record in peer.serving.items():
        holds(core.requests.open.get(identity) is record and record.worker is peer, "serves a stray", peer)
    for (identity, leg), ended in peer.ending.items():
        now = core.requests.open.get(identity)
        holds(now is None or now.leg > leg, "ends an attempt that is open", peer)
        holds(ended.state is State.ENDED and not ended.frames, "keeps the frames of what has ended", peer)
    for identity, record in peer.asked.items():
        holds(core.requests.open.get(identity) is record and record.asker is peer, "asked a stray", peer)
    offering = [service for service in peer.services if peer in service.workers]
    if peer.draining or peer.leaving:
        holds(not offering, "drains, and is still offered", peer)
    elif peer.hello.span is None:
        holds(len(offering) == len(peer.services), "is not offered", peer)
    else:
        leads = peer.pipeline is not None and peer.pipeline.leader is peer
        holds(bool(offering) == leads, "is offered, and leads no pipeline; or the other way round", peer)
    if peer.draining:
        holds(bool(peer.owner.load), "drains with nothing open, and was not let go", peer)


def _tables(core: Core) -> None:
    requests, peers = core.requests, core.roster.peers.values()
    holds(len(core.roster._by_nonce) == len(core.roster.peers), "nonces of peers that are gone")
    holds(sum(len(peer.asked) for peer in peers) == len(requests.open), "asked and open differ")
    running = sum(record.state is State.RUNNING for record in requests.open.values())
    holds(sum(len(peer.serving) for peer in peers) == running, "serving and running differ")
    for record in requests.open.values():
        waits = record.state is State.QUEUED and not record.service.offers
        named = min(record.deadline or float("inf"), record.wait if waits else float("inf"))
        holds(requests._due <= named, "something is due, and nobody will look", record)
    offers = Counter(service.name for peer in peers for service in peer.services)
    for service in requests.services.values():
        holds(service.offers == offers[service.name], f"{service.name}: {service.offers} offers counted")


def _queues(core: Core) -> None:
    requests = core.requests
    waiting: list[Record] = []
    for service in requests.services.values():
        records = service.queue.records()
        holds(service.queue.count == len(records), f"{service.name}: {service.queue.count} counted in the queue")
        fresh = sum(not record.attempt for record in records)
        holds(service.queue.fresh == fresh, f"{service.name}: {service.queue.fresh} counted as sent for the first time")
        holds(fresh <= core.limits.queue, f"{service.name}: {fresh} wait, more than the bound")
        free = [worker.name for worker in service.workers if worker.load < worker.capacity]
        holds(not records or not free, f"{service.name}: requests wait while {free} have credit")
        idle = [worker.name for worker in service.workers if not worker.load]
        holds(not service.suspects or not idle, f"{service.name}: suspects wait while {idle} are idle")
        holds(all(record.losses for record in service.suspects.values()), f"{service.name}: a suspect without a loss")
        waits = service.suspects and service.workers
        holds(not waits or service.kept in service.workers, f"{service.name}: no worker is kept for its suspects")
        records = service.records()
        for worker in service.workers:
            holds(core.roster.peers.get(worker.key) is worker, f"{service.name} offers {worker.name}, which is gone")
        waiting += records
    queued = {record.id for record in requests.open.values() if record.state is State.QUEUED}
    holds(len(waiting) == len(queued) and {record.id for record in waiting} == queued, "queues and states differ")
    for record in requests.open.values():
        holds(record.size == RECORD + sum(map(len, record.frames)), "is charged with another size", record)
    in_queues = sum(record.size for record in waiting)
    holds(requests.queued_bytes == in_queues, f"{requests.queued_bytes} bytes counted in the queues")


def _pipelines(pipelines: Pipelines) -> None:
    seen: list[Peer] = []
    for identity, pipeline in pipelines.formed.items():
        holds(pipeline.id == identity, "a pipeline is filed under another id")
        reached = 0
        for place, stage in enumerate(pipeline.stages):
            span = stage.hello.span
            holds(stage.pipeline is pipeline, "does not know its pipeline", stage)
            holds(span is not None and span.first == reached, "leaves a gap", stage)
            assert span is not None
            reached = span.last
            holds(_checkpoint(span) == _checkpoint(pipeline.spans[0]), "stages of two checkpoints in one pipeline")
            follower = pipeline.stages[place + 1].key if place + 1 < len(pipeline.stages) else None
            holds(pipeline.after.get(stage.key) == follower, "forwards to the wrong stage", stage)
        holds(reached == pipeline.spans[0].layers, "a pipeline lacks its last layers")
        seen += pipeline.stages
    holds(len(set(map(id, seen))) == len(seen), "a stage is in two pipelines")
    stages = pipelines.stages()
    formed = [stage for stage in stages if stage.pipeline is not None]
    holds({id(stage) for stage in formed} == {id(stage) for stage in seen}, "stages in pipelines that are not formed")
    spares = [stage for stage in stages if stage.pipeline is None and not stage.draining]
    holds(not _covered(spares), "spare stages cover all layers, and no pipeline was formed")


def _covered(stages: list[Peer]) -> bool:
    """Whether some of the stages join into a whole model; by search, unlike the broker's own way."""
    spans = [span for stage in stages if (span := stage.hello.span) is not None]
    reached = {(_checkpoint(span), span.last) for span in spans if span.first == 0}
    while True:
        more = {(_checkpoint(span), span.last) for span in spans if (_checkpoint(span), span.first) in reached}
        if more <= reached:
            return any((_checkpoint(span), span.layers) in reached for span in spans)
        reached |= more


def _checkpoint(span: Span) -> tuple[str, str, int]:
    return span.model, span.fingerprint, span.layers
