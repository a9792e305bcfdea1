"""An index directory opened for search: nearest entries, and what belongs to each. Knows no socket, no service."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .datastore import CONTEXT, Datastore, Passage
from .fields import Fields, tokens_of
from .manifest import FIELDS, Manifest, ManifestError, load_manifest, read_manifest
from .query import BadQuery, Counted, Found, Params
from .reading import check_version, read_datastore, read_faiss, read_ids, read_owners
from .segment import Segment

MAX_FIELD_BYTES: Final = 900_000  # of the payloads of one reply, whose body holds 1 MiB


class OpenIndex:
    """One index that does not change, or one shard of it. Searching is safe from several threads at once.

    Attributes:
        datastore: tokens and passages, where it is one.
    """

    def __init__(
        self,
        manifest: Manifest,
        segment: Segment,
        datastore: Datastore | None,
        fields: Fields | None,
        owners: NDArray[np.int32],
    ) -> None:
        self.manifest = manifest
        self.datastore = datastore
        self.segment = segment
        self._fields = fields
        self._owners = owners

    @property
    def dimension(self) -> int:
        return self.manifest.dimension

    @property
    def nlist(self) -> int:
        return self.segment.nlist

    def view(self) -> OpenIndex:
        """Itself: it does not change."""
        return self

    def info(self) -> dict[str, Any]:
        """See Searchable; `ntotal` is this shard's."""
        manifest = self.manifest
        said = ("name", "kind", "ntotal", "metric", "factory", "fingerprint", "model", "encoder", "tokens_per_payload")
        placed = ("shards", "shard", "by", "version")
        return {
            "d": manifest.dimension,
            "nlist": self.nlist,
            "live": False,
            **{name: getattr(manifest, name) for name in (*said, *placed)},
        }

    def search(
        self,
        queries: NDArray[np.float32],
        params: Params,
        lists: NDArray[np.int64] | None = None,
        coarse: NDArray[np.float32] | None = None,
        *,
        threads: int = 1,
    ) -> Found:
        """See Searchable. Distances are faiss's: squared L2, inner products, cosines. Raises BadQuery, BadFilter."""
        allowed = None
        if params.filter is not None:
            if self._fields is None:
                raise BadQuery(f"the index {self.manifest.name} has no fields to filter by; leave filter out")
            allowed = self._fields.allowed(params.filter)
        return self.segment.search(queries, params, allowed, lists, coarse, threads=threads)

    def following(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tokens behind each entry, int32 [*ids.shape, 8]: its value first; -1 behind a document or for id -1."""
        width = self.manifest.tokens_per_payload
        if self.datastore is None and self._fields is not None and width:  # a snapshot of a datastore with changes
            rows = self._rows(ids).ravel()
            given = self._fields.of(ids[ids >= 0].tolist())
            maps = (json.loads(given.get(number, "{}")) for number in np.where(rows < 0, -1, ids.ravel()).tolist())
            return tokens_of(maps, width).reshape(*ids.shape, width)
        return self._entries().behind(self._rows(ids))

    def passages(self, ids: NDArray[np.int64], before: int = CONTEXT, after: int = CONTEXT) -> list[Passage | None]:
        """The tokens around each entry of `ids` [n]: `before` up to it and `after` behind at most; None for id -1."""
        if ids.ndim != 1 or before < 0 or after < 0:
            raise BadQuery("passages wants ids of one dimension, and before and after of at least 0")
        return self._entries().passages(self._rows(ids), before, after)

    def ngrams(self, body: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> Counted:
        """See Searchable."""
        if self.datastore is None:
            raise BadQuery(f"the index {self.manifest.name} is no datastore: it has no tokens to count")
        return self.datastore.ngrams.answer(body, arrays)

    def payloads(self, ids: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
        """The passages around the entries of a datastore, else their fields; {} for id -1. Raises BadQuery."""
        if self.datastore is not None:
            maps = self.datastore.maps(self._rows(ids).ravel())
            return [maps[start : start + ids.shape[1]] for start in range(0, len(maps), ids.shape[1])]
        if self._fields is None:
            return [[{} for _ in row] for row in ids]
        return shown(self._fields.of(ids[ids >= 0].tolist()), ids)

    def centroids(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See Searchable."""
        if not self.nlist:
            raise BadQuery(f"the index {self.manifest.name} has no lists; send the queries alone")
        return self.segment.centroids(), self._owners

    def assign(self, queries: NDArray[np.float32], params: Params) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See Searchable."""
        if not self.nlist:
            raise BadQuery(f"the index {self.manifest.name} has no lists; send the queries alone")
        return self.segment.assign(queries, params)

    def _entries(self) -> Datastore:
        if self.datastore is None:
            raise BadQuery(f"the index {self.manifest.name} is no datastore: it has no tokens; leave following out")
        return self.datastore

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of ids, -1 for -1. Raises BadQuery for others than its own."""
        own = self.segment.ids
        if own is None:
            wrong = ids.size and (ids.min() < -1 or ids.max() >= self.manifest.ntotal)
            rows = ids
        elif not len(own):
            wrong, rows = (ids != -1).any(), ids
        else:
            rows = np.minimum(np.searchsorted(own, ids), len(own) - 1)
            rows = np.where(ids == -1, -1, rows)
            wrong = (np.where(ids == -1, -1, own[rows]) != ids).any()
        if wrong:
            raise BadQuery(f"ids leave the index; send -1 to {self.manifest.total - 1}, its own ones")
        return rows


def shown(fields: dict[int, str], ids: NDArray[np.int64]) -> list[list[dict[str, Any]]]:
    """Fields as the payloads of `ids` [m, k]. Raises BadQuery where they are more than a reply holds."""
    size = sum(len(fields.get(number, "").encode()) for number in ids.ravel().tolist())
    if size > MAX_FIELD_BYTES:
        raise BadQuery(
            f"the payloads have {size} bytes, a reply holds {MAX_FIELD_BYTES}; ask for fewer or without them"
        )
    return [[json.loads(fields[number]) if number in fields else {} for number in row] for row in ids.tolist()]


def open_index(path: Path, *, mmap: bool = False) -> OpenIndex:
    """Opens an index directory, or a shard's; the faiss file is read last.

    Args:
        mmap: map the vectors into memory instead of reading them, for an index that is larger than it.

    Raises ManifestError where the manifest, or what it promises, does not hold.
    """
    manifest = read_manifest(path)
    check_version(path, manifest)
    datastore = read_datastore(path, manifest) if manifest.kind == "datastore" else None
    ids = read_ids(path, manifest)
    fields = (
        Fields(path / FIELDS, ids, manifest.ntotal, whole=manifest.shards == 1) if FIELDS in manifest.files else None
    )
    segment = Segment(read_faiss(path, manifest, mmap), ids, manifest.metric)
    owners = read_owners(path, manifest, segment.nlist)
    if load_manifest(path) != manifest:
        raise ManifestError(f"{path}: was replaced while it was opened; open it again")
    return OpenIndex(manifest, segment, datastore, fields, owners)
