"""The files of an index directory into arrays and a faiss index, each as its manifest promises. Knows no search."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .datastore import Datastore
from .manifest import DOCUMENTS, ENTRIES, IDS, OWNERS, PAYLOADS, TOKENIZER, TOKENS, VECTORS, Manifest, ManifestError
from .quantizer import METRICS
from .stream import TokenStream
from .suffix import NgramTable

_AGAIN = "build the index again with `ralmq index build`"


def check_version(path: Path, manifest: Manifest) -> None:
    """An older faiss's file is readable, a newer one's may not be. Raises ManifestError."""
    written, installed = (re.match(r"(\d+)\.(\d+)", text) for text in (manifest.faiss_version, faiss.__version__))
    if written is None:
        raise ManifestError(f"{path}: faiss_version {manifest.faiss_version!r} is no version; {_AGAIN}")
    if installed is not None and tuple(map(int, written.groups())) > tuple(map(int, installed.groups())):
        raise ManifestError(
            f"{path}: written by faiss {manifest.faiss_version}, newer than the {faiss.__version__} installed here; "
            f"upgrade faiss-cpu or {_AGAIN}"
        )


def read_datastore(path: Path, manifest: Manifest) -> Datastore:
    """Payloads, entries and token stream, their arrays mapped. Raises ManifestError."""
    payloads = _load(path / PAYLOADS, np.dtype(np.int32), (manifest.ntotal, manifest.tokens_per_payload))
    entries = _load(path / ENTRIES, np.dtype(np.int64), (manifest.ntotal,))
    stream = _stream(path)
    if len(entries) and (entries.min() < 0 or entries.max() >= len(stream.tokens)):
        raise ManifestError(f"{path / ENTRIES}: offsets leave the token stream; {_AGAIN}")
    tokenizer = _tokenizer(path / TOKENIZER) if TOKENIZER in manifest.files else None
    return Datastore(payloads, entries, stream, tokenizer, NgramTable(stream, manifest.files[TOKENS].sha256[:16]))


def read_ids(path: Path, manifest: Manifest) -> NDArray[np.int64] | None:
    """The ids of the rows, ascending; None where a row's number is its id. Raises ManifestError."""
    if IDS not in manifest.files:
        return None
    ids = np.array(_load(path / IDS, np.dtype(np.int64), (manifest.ntotal,)))
    if len(ids) and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        raise ManifestError(f"{path / IDS}: ids are not ascending, from 0 on; {_AGAIN}")
    return ids


def read_owners(path: Path, manifest: Manifest, nlist: int) -> NDArray[np.int32]:
    """The shard of each list; zeros where vectors were not spread by list. Raises ManifestError."""
    if OWNERS not in manifest.files:
        return np.zeros(nlist, np.int32)
    owners = np.array(_load(path / OWNERS, np.dtype(np.int32), (nlist,)))
    if len(owners) and (owners.min() < 0 or owners.max() >= manifest.shards):
        raise ManifestError(f"{path / OWNERS}: names shards that there are not; {_AGAIN}")
    return owners


def read_faiss(path: Path, manifest: Manifest, mmap: bool) -> faiss.Index:
    """The faiss index, in memory or mapped; a mapped one must never be changed. Raises ManifestError."""
    at = path / VECTORS
    index = _read(at, (faiss.IO_FLAG_MMAP if manifest.factory.startswith("IVF") else faiss.IO_FLAG_MMAP_IFC) * mmap)
    found = (index.d, index.ntotal, index.metric_type)
    if found != (manifest.dimension, manifest.ntotal, METRICS[manifest.metric]):
        raise ManifestError(
            f"{at}: d {index.d}, {index.ntotal} vectors, metric {index.metric_type}; the manifest says "
            f"{manifest.dimension}, {manifest.ntotal}, {manifest.metric}; {_AGAIN}"
        )
    return index


def _read(path: Path, flags: int) -> faiss.Index:
    try:
        index = faiss.read_index(str(path), flags) if flags else faiss.read_index(str(path))
    except RuntimeError:
        raise ManifestError(f"{path}: faiss cannot read it; {_AGAIN}") from None
    if not isinstance(index, faiss.IndexFlat | faiss.IndexIVF | faiss.IndexHNSW):
        raise ManifestError(f"{path}: holds a {type(index).__name__}, which is not served; {_AGAIN}")
    return index


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
