"""Vectors and what belongs to them into an index directory, or one for each shard. Knows no service, no search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from .directory import OutputError, check_place, replacing, shard_name
from .factory import Filled, Layout, Rows, check_factory, default_factory, filled
from .fields import write_fields
from .manifest import (
    DOCUMENTS,
    ENTRIES,
    FIELDS,
    FILES,
    IDS,
    MANIFEST,
    OWNERS,
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
from .query import Metric
from .stream import PAYLOAD, TokenStream

OWN_FILES = (*FILES, TOKENIZER, IDS, OWNERS, FIELDS, MANIFEST)
MAX_SHARDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How an index is built from its vectors.

    Attributes:
        factory: faiss's string; None chooses by the number of vectors.
        shards: above 1, `out` holds a directory for each: shard-0, shard-1 ...
        by: rows i, i + shards, ... in shard i; or "list", whole lists of one inverted file.
        seed: fixes the training sample.
    """

    metric: Metric = "l2"
    factory: str | None = None
    shards: int = 1
    by: Layout = "rows"
    threads: int = 1
    seed: int = 0
    progress: Progress = silent


@dataclass(frozen=True, slots=True)
class _About:
    """What the manifests of all shards say alike."""

    name: str
    kind: Literal["datastore", "vectors"]
    model: str = ""
    fingerprint: str = ""
    encoder: str = ""
    tokens_per_payload: int = 0
    sources: tuple[str, ...] = ()


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
    **how: Any,
) -> Manifest:
    """Writes the datastore of `vectors` [n, d] to `out`, atomically, and returns the manifest of its first shard.

    Entry i has the key vectors[i] and the value that follows offset entries[i] of `stream`; its payload is the 8 tokens
    from there. `tokenizer`, the JSON of the model's own, lets the index give its passages as text; without one it gives
    token ids alone. `how`: the fields of Build. Raises OutputError for an `out`, a name, an array or a factory string
    that cannot be; OSError.
    """
    _check_vectors(vectors)
    _check_entries(vectors, entries, stream)

    def content(directory: Path, rows: Rows) -> None:
        _save(directory / PAYLOADS, stream.following(entries[rows]))
        _save(directory / ENTRIES, entries[rows])
        _save(directory / TOKENS, stream.tokens)
        documents = {"names": list(stream.names), "starts": stream.starts.tolist()}
        (directory / DOCUMENTS).write_text(json.dumps(documents), encoding="utf-8")
        if tokenizer is not None:
            (directory / TOKENIZER).write_text(tokenizer, encoding="utf-8")

    about = _About(name, "datastore", model, fingerprint, "", PAYLOAD, tuple(sources))
    return _write(out, vectors, about, content, Build(**how))


def write_vectors(
    out: Path,
    *,
    name: str,
    vectors: NDArray[np.float32],
    fields: Sequence[str] | None = None,
    encoder: str = "",
    sources: Sequence[str] = (),
    **how: Any,
) -> Manifest:
    """Writes an index of plain vectors [n, d] to `out`, atomically; entry i is row i.

    `fields`: the JSON of each entry's payload fields (see dump_fields). `encoder`: the service embed:<encoder> that
    makes vectors for it from text. `how`: the fields of Build. Returns and raises as write_index does.
    """
    if encoder and not valid_name(encoder):
        raise OutputError(f"{encoder!r}: an encoder's name is 1 to 64 letters, digits, '.', '_' or '-'")
    _check_vectors(vectors)
    if fields is not None and len(fields) != len(vectors):
        raise OutputError(f"{len(fields)} lines of fields for {len(vectors)} vectors; give one for each")

    def content(directory: Path, rows: Rows) -> None:
        if fields is not None:
            write_fields(directory / FIELDS, rows.tolist(), (fields[row] for row in rows.tolist()))

    about = _About(name, "vectors", encoder=encoder, sources=tuple(sources))
    return _write(out, vectors, about, content, Build(**how))


def check_build(out: Path, name: str, how: Build, *, total: int = 0, width: int = 0) -> None:
    """Raises OutputError for what cannot be built, of `total` vectors of `width` dimensions where these are known.

    For those who work long for their vectors: before that.
    """
    check_name(name)
    check_place(out, OWN_FILES)
    most = min(MAX_SHARDS, total or MAX_SHARDS)
    if not 1 <= how.shards <= most:
        raise OutputError(f"{how.shards} shards{f' for {total} vectors' if total else ''}; give 1 to {most}")
    if how.factory is not None or total:
        by: Layout = how.by if how.shards > 1 else "rows"
        string = how.factory or default_factory(total)
        check_factory(string, width=width, total=total, shards=how.shards, by=by)


def check_name(name: str) -> None:
    """Raises OutputError for a name that no index can have."""
    if not valid_name(name):
        raise OutputError(f"{name!r}: an index name is 1 to 64 letters, digits, '.', '_' or '-'; choose another")


def _write(
    out: Path, vectors: NDArray[np.float32], about: _About, content: Callable[[Path, Rows], None], how: Build
) -> Manifest:
    check_build(out, about.name, how, total=len(vectors), width=vectors.shape[1])
    string = how.factory or default_factory(len(vectors))
    if how.by == "list" and how.shards == 1:
        how = replace(how, by="rows")
    with replacing(out, OWN_FILES) as directory:
        made = filled(
            vectors,
            string,
            how.metric,
            shards=how.shards,
            by=how.by,
            threads=how.threads,
            seed=how.seed,
            progress=how.progress,
        )
        places = [directory] if how.shards == 1 else [directory / shard_name(shard) for shard in range(how.shards)]
        for place, (index, rows) in zip(places, made.shards, strict=True):
            place.mkdir(exist_ok=True)
            faiss.write_index(index, str(place / VECTORS))
            content(place, rows)
            if how.shards > 1:
                _save(place / IDS, rows)
            if made.owners is not None:
                _save(place / OWNERS, made.owners)
        manifests = _manifests(places, vectors, made, about, string, how)
        for place, manifest in zip(places, manifests, strict=True):
            write_manifest(place, manifest)
    return manifests[0]


def _manifests(
    places: Sequence[Path], vectors: NDArray[np.float32], made: Filled, about: _About, string: str, how: Build
) -> list[Manifest]:
    records = [_records(place) for place in places]
    seen = [
        [string, how.metric, how.by],
        asdict(about),
        [[record.sha256 for record in each.values()] for each in records],
    ]
    version = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    return [
        Manifest(
            **asdict(about) | {"sources": about.sources},
            dimension=vectors.shape[1],
            ntotal=len(rows),
            total=len(vectors),
            metric=how.metric,
            factory=string,
            faiss_version=faiss.__version__,
            version=version,
            shard=shard,
            shards=how.shards,
            by=how.by,
            files=records[shard],
        )
        for shard, (_, rows) in enumerate(made.shards)
    ]


def _records(directory: Path) -> dict[str, FileRecord]:
    return {path.name: record_file(path) for path in sorted(directory.iterdir())}


def _save(path: Path, array: NDArray[np.int32] | NDArray[np.int64]) -> None:
    np.save(path, array, allow_pickle=False)


def _check_vectors(vectors: NDArray[np.float32]) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float32 or 0 in vectors.shape:
        raise OutputError(
            f"vectors are {vectors.dtype} {list(vectors.shape)}; give float32 [n, d] with n and d above 0"
        )


def _check_entries(vectors: NDArray[np.float32], entries: NDArray[np.int64], stream: TokenStream) -> None:
    if entries.dtype != np.int64 or entries.shape != (len(vectors),):
        raise OutputError(f"entries are {entries.dtype} {list(entries.shape)}; give int64, one for each vector")
    if entries.min() < 0 or entries.max() >= len(stream.tokens):
        raise OutputError(f"entries leave the stream of {len(stream.tokens)} tokens; give offsets inside it")
