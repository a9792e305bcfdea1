"""Pipelines formed from the spans that stages offer. Knows spans and layers; sends nothing."""

import struct
from itertools import pairwise

from .records import Peer, Pipeline

Group = tuple[str, str, int]  # model, fingerprint, layers
PIPELINE = b"pipeline"  # every id of one begins so, and no id of a request


class Pipelines:
    """All stages, and the pipelines they belong to; a stage without one is a spare."""

    def __init__(self, epoch: int) -> None:
        self.formed: dict[bytes, Pipeline] = {}
        self._epoch = epoch
        self._count = 0
        self._stages: dict[Group, list[Peer]] = {}

    def add(self, peer: Peer) -> list[Pipeline]:
        """A stage announced its span. Returns the pipelines that it completes."""
        group = _group(peer)
        self._stages.setdefault(group, []).append(peer)
        return self._form(group)

    def remove(self, peer: Peer) -> list[Pipeline]:
        """A stage, already out of its pipeline (see `dissolve`), is gone. Returns the pipelines formed anew."""
        group = _group(peer)
        self._stages[group].remove(peer)
        if not self._stages[group]:
            del self._stages[group]
            return []
        return self._form(group)

    def dissolve(self, pipeline: Pipeline) -> None:
        """Ends a pipeline: its stages are spares."""
        del self.formed[pipeline.id]
        for stage in pipeline.stages:
            stage.pipeline = None

    def missing(self, model: str) -> str:
        """The layers that no ready stage of the model covers, for an error message."""
        gaps: set[str] = set()
        for (name, _, layers), stages in self._stages.items():
            if name == model:
                gaps |= _gaps([stage for stage in stages if not stage.draining], layers)
        return ", ".join(sorted(gaps)) or "none, but spans do not join into one pipeline"

    def stages(self) -> list[Peer]:
        """Every stage of every model."""
        return [stage for stages in self._stages.values() for stage in stages]

    def _form(self, group: Group) -> list[Pipeline]:
        formed: list[Pipeline] = []
        while chain := self._chain(group):
            self._count += 1
            identity = struct.pack("<8sII", PIPELINE, self._epoch, self._count)
            pipeline = Pipeline(identity, group[0], chain)
            pipeline.after = {a.key: b.key for a, b in pairwise(chain)}
            for stage in chain:
                stage.pipeline = pipeline
            self.formed[identity] = pipeline
            formed.append(pipeline)
        return formed

    def _chain(self, group: Group) -> list[Peer]:
        """Spares that cover all layers one after the other, preferring long spans; empty where there are none."""
        layers = group[2]
        starts: dict[int, list[tuple[int, Peer]]] = {}
        for stage in self._stages[group]:
            if stage.pipeline is None and not stage.draining and stage.hello.span is not None:
                starts.setdefault(stage.hello.span.first, []).append((stage.hello.span.last, stage))
        reach: dict[int, list[Peer]] = {layers: []}  # from this layer on, who covers the rest
        for first in sorted(starts, reverse=True):
            for last, stage in sorted(starts[first], key=lambda entry: entry[0], reverse=True):
                if last in reach:
                    reach[first] = [stage, *reach[last]]
                    break
        return reach.get(0, [])


def _group(peer: Peer) -> Group:
    span = peer.hello.span
    assert span is not None
    return span.model, span.fingerprint, span.layers


def _gaps(stages: list[Peer], layers: int) -> set[str]:
    gaps: set[str] = set()
    reached = 0
    spans = [(span.first, span.last) for stage in stages if (span := stage.hello.span) is not None]
    for first, last in [*sorted(spans), (layers, layers)]:
        if first > reached:
            gaps.add(f"{reached}-{first - 1} of {layers}")
        reached = max(reached, last)
    return gaps
