"""Vectors and their token stream into an index directory: chooses, trains, fills the faiss index. Knows no service."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from .directory import OutputError, replacing
from .manifest import (
    DOCUMENTS,
    ENTRIES,
    FILES,
    MANIFEST,
    PAYLOADS,
    TOKENIZER,
    TOKENS,
    VECTORS,
    FileRecord,
    Manifest,
    record_file,
    valid_name,
    write_manifest,
)
from .progress import Progress, silent
from .stream import PAYLOAD, TokenStream

OWN_FILES = (*FILES, TOKENIZER, MANIFEST)
METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}
FLAT_BELOW = 20_000
_TRAINED_PER_LIST = 39  # the fewest points a centroid that faiss trains without a warning
_ROWS_AT_ONCE = 65_536


def default_factory(ntotal: int) -> str:
    """faiss's string for `ntotal` vectors: exact below 20,000, else an inverted file of about sqrt(n) lists.

    Four times as many lists took eight times as long to train and fill at 250,000, and predicted no better.
    """
    return "Flat" if ntotal < FLAT_BELOW else f"IVF{round(math.sqrt(ntotal))},Flat"


def write_index(
    out: Path,
    *,
    name: str,
    vectors: NDArray[np.float32],
    stream: TokenStream,
    entries: NDArray[np.int64],
    model: str,
    fingerprint: str,
    tokenizer: str | None = None,
    sources: Sequence[str] = (),
    metric: Literal["l2", "ip"] = "l2",
    factory: str | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> Manifest:
    """Writes the index of `vectors` [n, d] to `out`, atomically, and returns its manifest.

    Entry i has the key vectors[i] and the value that follows offset entries[i] of `stream`; its payload is the 8 tokens
    from there. `tokenizer`, the JSON of the model's own, lets the index give its passages as text; without one it gives
    token ids alone. `factory` None chooses by n. `seed` fixes the training sample. Raises OutputError for an `out`, a
    name, an array or a factory string that cannot be; OSError.
    """
    check_name(name)
    _check_arrays(vectors, entries, stream)
    string = factory or default_factory(len(vectors))
    with replacing(out, OWN_FILES) as directory:
        index = _filled(vectors, string, metric, threads, seed, progress)
        faiss.write_index(index, str(directory / VECTORS))
        _save(directory / PAYLOADS, stream.following(entries))
        _save(directory / ENTRIES, entries)
        _save(directory / TOKENS, stream.tokens)
        documents = {"names": list(stream.names), "starts": stream.starts.tolist()}
        (directory / DOCUMENTS).write_text(json.dumps(documents), encoding="utf-8")
        if tokenizer is not None:
            (directory / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        manifest = Manifest(
            name=name,
            dimension=vectors.shape[1],
            ntotal=len(vectors),
            metric=metric,
            factory=string,
            faiss_version=faiss.__version__,
            model=model,
            fingerprint=fingerprint,
            tokens_per_payload=PAYLOAD,
            sources=tuple(sources),
            files=_records(directory),
        )
        write_manifest(directory, manifest)
    return manifest


def check_name(name: str) -> None:
    """Raises OutputError for a name that no index can have."""
    if not valid_name(name):
        raise OutputError(f"{name!r}: an index name is 1 to 64 letters, digits, '.', '_' or '-'; choose another")


def _records(directory: Path) -> dict[str, FileRecord]:
    return {path.name: record_file(path) for path in sorted(directory.iterdir())}


def _save(path: Path, array: NDArray[np.int32] | NDArray[np.int64]) -> None:
    np.save(path, array, allow_pickle=False)


def _check_arrays(vectors: NDArray[np.float32], entries: NDArray[np.int64], stream: TokenStream) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float32 or 0 in vectors.shape:
        raise OutputError(
            f"vectors are {vectors.dtype} {list(vectors.shape)}; give float32 [n, d] with n and d above 0"
        )
    if entries.dtype != np.int64 or entries.shape != (len(vectors),):
        raise OutputError(f"entries are {entries.dtype} {list(entries.shape)}; give int64, one for each vector")
    if entries.min() < 0 or entries.max() >= len(stream.tokens):
        raise OutputError(f"entries leave the stream of {len(stream.tokens)} tokens; give offsets inside it")


def _filled(
    vectors: NDArray[np.float32], string: str, metric: str, threads: int, seed: int, progress: Progress
) -> faiss.Index:
    """The trained index with all vectors. OpenMP's thread count belongs to the calling thread, so it is set here."""
    faiss.omp_set_num_threads(threads)
    total = len(vectors)
    try:
        index = faiss.index_factory(vectors.shape[1], string, METRICS[metric])
    except RuntimeError:
        raise OutputError(f"{string!r}: faiss knows no such index; give 'Flat' or 'IVF<lists>,Flat'") from None
    if isinstance(index, faiss.IndexIVF):
        if index.nlist > total:
            raise OutputError(f"{string!r}: {index.nlist} lists for {total} vectors; give at most {total}")
        index.cp.seed = seed
        rows = min(total, _TRAINED_PER_LIST * index.nlist)
        sample = np.random.default_rng(seed).choice(total, rows, replace=False)
        progress("train", 0, 1)
        index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
        progress("train", 1, 1)
    elif not isinstance(index, faiss.IndexFlat):
        raise OutputError(f"{string!r}: no such index is served; give 'Flat' or 'IVF<lists>,Flat'")
    for start in range(0, total, _ROWS_AT_ONCE):
        rows_here = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE])
        if not np.isfinite(rows_here).all():
            raise OutputError(f"vectors {start} to {start + len(rows_here)} hold NaN or infinity; mend what made them")
        index.add(rows_here)
        progress("fill", start + len(rows_here), total)
    return index
