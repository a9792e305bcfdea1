"""The broker as a user sees it: plain data for `ralmq status`. Reads the state, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .records import Peer

if TYPE_CHECKING:
    from .pipelines import Pipelines
    from .requests import Requests
    from .roster import Roster


def snapshot(
    now: float, started: float, epoch: int, roster: Roster, requests: Requests, pipelines: Pipelines
) -> dict[str, Any]:
    """Broker, workers, services and pipelines."""
    workers = [peer for peer in roster.peers.values() if peer.works]
    models = {span.model for stage in pipelines.stages() if (span := stage.hello.span)}
    return {
        "broker": {
            "epoch": epoch,
            "uptime_s": round(now - started, 3),
            "clients": len(roster.peers) - len(workers),
            "open_requests": len(requests.open),
            "queued_bytes": requests.queued_bytes,
            "held_bytes": sum(peer.held for peer in roster.peers.values()),
            "memory_bytes": requests.memory,
            "quarantine": len(requests.quarantine),
            "counts": dict(requests.counts),
        },
        "workers": [_worker(peer) for peer in workers],
        "lost": [
            {"name": peer.name, "services": list(peer.hello.services), "age_s": round(now - at, 3), "why": why}
            for at, peer, why in roster.gone.values()
        ],
        "services": {
            name: {
                "workers": len(service.workers),
                "queued": service.waiting,
                "finished": service.finished,
                "rate": round(service.rate, 3),
            }
            for name, service in sorted(requests.services.items())
        },
        "pipelines": [
            {
                "model": pipeline.model,
                "formed": True,
                "stages": [stage.name for stage in pipeline.stages],
                "missing": "",
                "bubble": _bubbles(pipeline.stages),
            }
            for pipeline in pipelines.formed.values()
        ]
        + [
            {"model": model, "formed": False, "stages": [], "missing": pipelines.missing(model)}
            for model in sorted(models - {pipeline.model for pipeline in pipelines.formed.values()})
        ],
    }


def _bubbles(stages: Sequence[Peer]) -> list[float | None]:
    """Of each stage, the share of the time in which its pipeline had work that it stood idle; None before there is any.

    Since the pipeline was formed, and as of the stages' last beats.
    """
    work = _seconds(stages[0], "work_s")
    return [round(min(1.0, max(0.0, 1 - _seconds(s, "compute_s") / work)), 3) if work > 0 else None for s in stages]


def _seconds(peer: Peer, gauge: str) -> float:
    """A gauge is whatever the worker says."""
    value = peer.gauges.get(gauge)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0


def _worker(peer: Peer) -> dict[str, Any]:
    span = peer.hello.span
    described: dict[str, Any] = {
        "name": peer.name,
        "services": [service.name for service in peer.services],
        "state": _state(peer),
        "pid": peer.hello.pid,
        "in_flight": peer.load,
        "capacity": peer.hello.capacity,
        **({"key": peer.entry.name} if peer.entry is not None else {}),
        "labels": peer.hello.labels,
        **({"gauges": peer.gauges} if peer.gauges else {}),
    }
    if span is not None:
        described["layers"] = [span.first, span.last, span.layers]
    return described


def _state(peer: Peer) -> str:
    if peer.draining:
        return "draining"
    return "spare" if peer.hello.span is not None and peer.pipeline is None else "ready"
