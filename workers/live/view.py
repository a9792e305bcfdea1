"""One state of a live index as it is searched: its entries, payloads, filters, lists. Changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from ..index.fields import tokens_of
from ..index.filter import BadFilter, Filter
from ..index.query import BadQuery, Counted, Found, Params
from ..index.segment import Allowed, Segment
from ..index.store import MAX_FIELD_BYTES
from .base import Base
from .log import Log
from .segments import Ids, State, Vectors

FILTERS: Final = 16  # whose allowed rows a view keeps


@dataclass(frozen=True, eq=False)
class LiveView:
    """One state of a live index: what is answered from it belongs to one moment. See query.Searchable.

    Attributes:
        said: what the base says of itself, where there is one.
        nothing: a trained inverted file without vectors, from which lists are told; None where there is none.
    """

    log: Log
    base: Base | None
    said: Mapping[str, Any]
    state: State
    nothing: Any
    _allowed: dict[Filter, list[Allowed]] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        return self.log.settings.dimension

    @property
    def nlist(self) -> int:
        return 0 if self.nothing is None else int(self.nothing.nlist)

    def info(self) -> dict[str, Any]:
        """See Searchable; `changes` is the number of the last change, `unmerged` the entries that are still flat."""
        settings = self.log.settings
        flat = (part for part in self.state.parts if isinstance(part.segment.index, faiss.IndexFlat))
        said = {"kind": "vectors", "model": "", "fingerprint": "", "tokens_per_payload": 0, **self.said}
        return said | {
            "name": settings.name,
            "d": settings.dimension,
            "ntotal": self.state.count,
            "metric": settings.metric,
            "factory": settings.factory,
            "nlist": self.nlist,
            "encoder": settings.encoder,
            "shards": settings.shards,
            "shard": settings.shard,
            "by": "rows",
            "version": settings.version,
            "live": True,
            "changes": self.state.seq,
            "unmerged": 0 if settings.factory == "Flat" else sum(part.count for part in flat),
        }

    def search(
        self,
        queries: Vectors,
        params: Params,
        lists: NDArray[np.int64] | None = None,
        coarse: Vectors | None = None,
        *,
        threads: int = 1,
    ) -> Found:
        """See Searchable. What is not merged yet is compared in full. Raises BadFilter, BadQuery."""
        if lists is not None:
            self._lists()
        parts = self.state.parts
        allowed: Sequence[Allowed | None] = [part.alive for part in parts]
        if params.filter is not None:
            if params.filter not in self._allowed:
                if len(self._allowed) >= FILTERS:
                    self._allowed.clear()
                ids = self._matching(params.filter)
                self._allowed[params.filter] = [part.only(ids) for part in parts]
            allowed = self._allowed[params.filter]
        return self.state.search(queries, params, allowed, lists, coarse, threads)

    def ngrams(self, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Counted:
        """See Searchable; those of the texts that it was built of."""
        if self.base is None:
            raise BadQuery(f"the index {self.log.settings.name} is no datastore: it has no tokens to count")
        return self.base.index.ngrams(body, arrays)

    def following(self, ids: Ids) -> NDArray[np.int32]:
        """See Searchable; what was added has those of its field `tokens`."""
        width = int(self.said.get("tokens_per_payload", 0))
        if not width:
            raise BadQuery(f"the index {self.log.settings.name} has no tokens; leave following out")
        given = self.log.fields(ids[ids >= 0].tolist(), self.state.seq)
        found = np.full((ids.size, width), -1, np.int32)
        flat = ids.ravel()
        added = np.array([number in given for number in flat.tolist()], np.bool_)
        if added.any():
            found[added] = tokens_of((given[number] for number in flat[added].tolist()), width)
        based = ~added & (flat >= 0)
        if self.base is not None and based.any():
            found[based] = self.base.following(flat[based])
        return found.reshape(*ids.shape, width)

    def payloads(self, ids: Ids) -> list[list[dict[str, Any]]]:
        """See Searchable. Raises BadQuery where they are more than a reply holds."""
        flat = ids.ravel()
        known = self.fields(flat[flat >= 0])
        size = sum(len(json.dumps(known[number])) for number in flat[flat >= 0].tolist())
        if size > MAX_FIELD_BYTES:
            raise BadQuery(f"the payloads have {size} bytes, a reply holds {MAX_FIELD_BYTES}; ask for fewer")
        return [[known[number] if number >= 0 else {} for number in row] for row in ids.tolist()]

    def fields(self, ids: Ids) -> dict[int, dict[str, Any]]:
        """What is known of each of the ids, as it was in this state."""
        found = self.log.fields(ids.tolist(), self.state.seq)
        rest = np.array([number for number in dict.fromkeys(ids.tolist()) if number not in found], np.int64)
        if self.base is not None:
            found.update(zip(rest.tolist(), self.base.payloads(rest), strict=True))
        return {number: {} for number in rest.tolist()} | found

    def centroids(self) -> tuple[Vectors, NDArray[np.int32]]:
        """See Searchable."""
        return self._lists().centroids(), np.zeros(self.nlist, np.int32)

    def assign(self, queries: Vectors, params: Params) -> tuple[NDArray[np.int64], Vectors]:
        """See Searchable."""
        return self._lists().assign(queries, params)

    def _lists(self) -> Segment:
        settings = self.log.settings
        if settings.shards > 1 and not settings.base:
            raise BadQuery(
                f"each shard of {settings.name} has lists of its own, since it began empty; send queries alone"
            )
        if self.nothing is None:
            raise BadQuery(f"the index {self.log.settings.name} has no lists by now; send the queries alone")
        return Segment(self.nothing, None, self.state.metric)

    def _matching(self, condition: Filter) -> Ids:
        live, base, seq = self.log, self.base, self.state.seq
        for path in condition.names if live.settings.shards == 1 else ():  # a shard may lack what another one has
            if path not in live.names and (base is None or not base.names(path)):
                name = path.removeprefix("$.").replace('"', "")
                raise BadFilter(f"no entry has the field {name}; filter by one that entries were added with")
        found = live.alive(seq, condition)
        if base is None:
            return found
        return np.concatenate([found, np.setdiff1d(base.matching(condition), live.alive(seq))])
