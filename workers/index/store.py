"""An index directory opened for search: nearest entries, the tokens that follow them, the passages around them.

Knows faiss, numpy and the tokenizer that the directory carries; no socket, no service, no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ...schema.errors import Refused
from .manifest import (
    DOCUMENTS,
    ENTRIES,
    PAYLOADS,
    TOKENIZER,
    TOKENS,
    VECTORS,
    Manifest,
    ManifestError,
    load_manifest,
    read_manifest,
)
from .stream import PAD, TokenStream
from .writer import METRICS

MAX_K = 1024
MAX_HITS = 1 << 22  # rows x k of one query: its reply with payloads stays under a message's 256 MiB
DEFAULT_NPROBE = 8
_AGAIN = "build the index again with `ralmq index build`"


class BadQuery(Refused, ValueError):
    """A query the index refuses before it searches; one line that says what is wrong with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """Tokens around one entry: int32 [n], the first `split` of them its context, the others what follows in `document`.

    `start` is the offset of the first of them in that document.
    """

    document: str
    start: int
    split: int
    tokens: NDArray[np.int32]


class OpenIndex:
    """One index, read into memory (its arrays mapped). Searching is safe from several threads at once.

    `tokenizer` decodes its tokens; None where the directory holds none.
    """

    def __init__(
        self,
        manifest: Manifest,
        index: faiss.Index,
        payloads: NDArray[np.int32],
        entries: NDArray[np.int64],
        stream: TokenStream,
        tokenizer: Tokenizer | None,
        threads: int,
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self._index = index
        self._payloads = payloads
        self._entries = entries
        self._stream = stream
        self._threads = threads
        self._missing = np.float32(np.inf if manifest.metric == "l2" else -np.inf)

    def search(
        self, queries: NDArray[np.float32], k: int, nprobe: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k nearest entries of each query [m, d]: ids int64 [m, k] and distances float32 [m, k], best first.

        Distances are faiss's: squared L2, or inner products for metric "ip". Where fewer than k are found the id is -1
        and the distance infinitely far. `nprobe` (default 8) is the number of lists looked into by an inverted file; an
        exact index has none and takes no notice. Raises BadQuery.
        """
        asked = self._checked(queries, k, nprobe)
        if len(asked) == 0:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        params = None
        if isinstance(self._index, faiss.IndexIVF):
            params = faiss.SearchParametersIVF()
            params.nprobe = min(nprobe or DEFAULT_NPROBE, self._index.nlist)
        # OpenMP keeps its thread count per calling thread, and calls come from a pool's threads.
        faiss.omp_set_num_threads(self._threads)
        distances, ids = self._index.search(asked, k, params=params)
        return ids.astype(np.int64, copy=False), np.where(ids < 0, self._missing, distances).astype(np.float32)

    def following(self, ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tokens behind each entry, int32 [*ids.shape, 8]: its value first; -1 behind a document or for id -1."""
        self._check_ids(ids)
        found = self._payloads[np.maximum(ids, 0)]
        return np.where((ids < 0)[..., None], np.int32(PAD), found).astype(np.int32)

    def passages(self, ids: NDArray[np.int64], before: int = 16, after: int = 16) -> list[Passage | None]:
        """The tokens around each entry of `ids` [n]: `before` up to it and `after` behind at most; None for id -1."""
        if ids.ndim != 1 or before < 0 or after < 0:
            raise BadQuery("passages wants ids of one dimension, and before and after of at least 0")
        self._check_ids(ids)
        offsets = self._entries[np.maximum(ids, 0)]
        numbers = self._stream.documents_of(offsets)
        ends = self._stream.ends
        found: list[Passage | None] = []
        for entry, offset, number in zip(ids.tolist(), offsets.tolist(), numbers.tolist(), strict=True):
            start = int(self._stream.starts[number])
            first = max(start, offset + 1 - before)
            last = min(int(ends[number]), offset + 1 + after)
            window = Passage(
                self._stream.names[number], first - start, offset + 1 - first, self._stream.tokens[first:last]
            )
            found.append(window if entry >= 0 else None)
        return found

    def _checked(self, queries: NDArray[np.float32], k: int, nprobe: int | None) -> NDArray[np.float32]:
        wanted = self.manifest.dimension
        if queries.dtype != np.float32:
            raise BadQuery(f"queries are {queries.dtype}; send float32")
        if queries.ndim != 2 or queries.shape[1] != wanted:
            raise BadQuery(
                f"queries have shape {list(queries.shape)}; the index {self.manifest.name} wants [m, {wanted}]"
            )
        if type(k) is not int or not 1 <= k <= MAX_K:
            raise BadQuery(f"k is {k!r}; send a whole number from 1 to {MAX_K}")
        if nprobe is not None and (type(nprobe) is not int or nprobe < 1):
            raise BadQuery(f"nprobe is {nprobe!r}; send a whole number of at least 1")
        if len(queries) * k > MAX_HITS:
            raise BadQuery(f"{len(queries)} queries of k {k} are over {MAX_HITS} hits; send them in parts")
        if not np.isfinite(queries).all():
            raise BadQuery("queries hold NaN or infinity; send finite numbers")
        return np.require(queries, requirements=["C", "A"])

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        if ids.size and (ids.min() < -1 or ids.max() >= self.manifest.ntotal):
            raise BadQuery(f"ids leave the index; send -1 to {self.manifest.ntotal - 1}")


def open_index(path: Path, threads: int = 1) -> OpenIndex:
    """Opens the index directory `path`; `threads` is what one search may use. The faiss file is read last.

    Raises ManifestError where the manifest, or what it promises, does not hold.
    """
    manifest = read_manifest(path)
    _check_version(path, manifest)
    payloads = _load(path / PAYLOADS, np.dtype(np.int32), (manifest.ntotal, manifest.tokens_per_payload))
    entries = _load(path / ENTRIES, np.dtype(np.int64), (manifest.ntotal,))
    stream = _stream(path)
    if entries.min() < 0 or entries.max() >= len(stream.tokens):
        raise ManifestError(f"{path / ENTRIES}: offsets leave the token stream; {_AGAIN}")
    tokenizer = _tokenizer(path / TOKENIZER) if TOKENIZER in manifest.files else None
    index = _read_faiss(path / VECTORS)
    found = (index.d, index.ntotal, index.metric_type)
    if found != (manifest.dimension, manifest.ntotal, METRICS[manifest.metric]):
        raise ManifestError(
            f"{path / VECTORS}: d {index.d}, {index.ntotal} vectors, metric {index.metric_type}; the manifest says "
            f"{manifest.dimension}, {manifest.ntotal}, {manifest.metric}; {_AGAIN}"
        )
    if load_manifest(path) != manifest:
        raise ManifestError(f"{path}: was replaced while it was opened; open it again")
    return OpenIndex(manifest, index, payloads, entries, stream, tokenizer, threads)


def _check_version(path: Path, manifest: Manifest) -> None:
    """An older faiss's file is readable, a newer one's may not be."""
    written, installed = (re.match(r"(\d+)\.(\d+)", text) for text in (manifest.faiss_version, faiss.__version__))
    if written is None:
        raise ManifestError(f"{path}: faiss_version {manifest.faiss_version!r} is no version; {_AGAIN}")
    if installed is not None and tuple(map(int, written.groups())) > tuple(map(int, installed.groups())):
        raise ManifestError(
            f"{path}: written by faiss {manifest.faiss_version}, newer than the {faiss.__version__} installed here; "
            f"upgrade faiss-cpu or {_AGAIN}"
        )


def _load(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...] | None) -> NDArray[Any]:
    """The array in `path`, mapped; `shape` None means any one dimension."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise ManifestError(f"{path}: is no .npy file; {_AGAIN}") from None
    if array.dtype != dtype or (array.ndim != 1 if shape is None else array.shape != shape):
        wanted = "[n]" if shape is None else str(list(shape))
        raise ManifestError(f"{path}: {array.dtype} {list(array.shape)} where {dtype} {wanted} is promised; {_AGAIN}")
    return array


def _stream(path: Path) -> TokenStream:
    tokens = _load(path / TOKENS, np.dtype(np.int32), None)
    try:
        found = json.loads((path / DOCUMENTS).read_bytes())
        names: Sequence[str] = found["names"]
        if not all(isinstance(name, str) for name in names):
            raise TypeError
        return TokenStream(tokens, tuple(names), np.array(found["starts"], dtype=np.int64))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ManifestError(f"{path / DOCUMENTS}: holds no names with their starts; {_AGAIN}") from None


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises plain Exception
        raise ManifestError(f"{path}: holds no tokenizer that can be read; {_AGAIN}") from None


def _read_faiss(path: Path) -> faiss.Index:
    try:
        index = faiss.read_index(str(path))
    except RuntimeError:
        raise ManifestError(f"{path}: faiss cannot read it; {_AGAIN}") from None
    if not isinstance(index, faiss.IndexFlat | faiss.IndexIVF):
        raise ManifestError(f"{path}: holds a {type(index).__name__}, which is not served; {_AGAIN}")
    return index
