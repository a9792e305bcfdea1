"""What an index directory says of itself, and the check that its files are those it names.

Knows no faiss: it runs before faiss reads anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ...schema.errors import Refused

FORMAT = 2
MANIFEST = "manifest.json"
VECTORS = "index.faiss"
PAYLOADS = "payloads.npy"
ENTRIES = "entries.npy"
TOKENS = "tokens.npy"
DOCUMENTS = "documents.json"
TOKENIZER = "tokenizer.json"
IDS = "ids.npy"
OWNERS = "owners.npy"
FIELDS = "fields.db"
SEAL = "manifest.sha256"  # of a snapshot: the manifest's own sha256, hex
FILES = (VECTORS, PAYLOADS, ENTRIES, TOKENS, DOCUMENTS)  # of every datastore; TOKENIZER where its texts can be read
KINDS = {"datastore": (FILES, {TOKENIZER, IDS, OWNERS}), "vectors": ((VECTORS,), {FIELDS, IDS, OWNERS})}
METRICS = ("l2", "ip", "cosine")
LAYOUTS = ("rows", "list")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 20
_AGAIN = "build the index again with `ralmq index build`"


class ManifestError(Refused, ValueError):
    """An index directory that cannot be used; the message is one line: the file, its fault, what to do."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file of the directory."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """One index, or one shard of it: `ntotal` float32 vectors of `dimension`, of `total` in all shards.

    Raises ManifestError on a field out of its range.

    Attributes:
        kind: "datastore", whose vectors are a model's hidden states, or "vectors" of any origin.
        factory: faiss's own index string.
        version: differs where anything in any shard differs; the same in all shards.
        model, fingerprint: the model whose hidden states a datastore holds; else empty.
        encoder: an embed:<encoder> that makes vectors for it from text; empty for none.
        tokens_per_payload: of a datastore; else 0.
        by: how vectors were spread over shards: "rows", or "list" where each holds whole lists of one inverted file.
        files: those that every index of the kind has, and others as KINDS allows.
    """

    name: str
    kind: Literal["datastore", "vectors"]
    dimension: int
    ntotal: int
    total: int
    metric: Literal["l2", "ip", "cosine"]
    factory: str
    faiss_version: str
    version: str
    model: str
    fingerprint: str
    encoder: str
    tokens_per_payload: int
    shard: int
    shards: int
    by: Literal["rows", "list"]
    sources: tuple[str, ...]
    files: dict[str, FileRecord]
    format: int = FORMAT

    def __post_init__(self) -> None:
        for field in ("name", "kind", "factory", "faiss_version", "version", "model", "fingerprint", "encoder"):
            _want(isinstance(getattr(self, field), str), f"{field} is not a string")
        _want(self.kind in KINDS, f"kind is not {' or '.join(KINDS)}")
        least = {"dimension": 1, "total": 1, "shards": 1, "shard": 0}
        least["ntotal"] = 0 if self.shards != 1 else 1
        least["tokens_per_payload"] = 1 if self.kind == "datastore" else 0
        for field, bound in least.items():
            sign = "positive" if bound else "non-negative"
            _want(
                type(getattr(self, field)) is int and getattr(self, field) >= bound, f"{field} is not a {sign} integer"
            )
        _want(self.shard < self.shards, "shard is not below shards")
        _want(self.ntotal <= self.total, "ntotal is above total")
        _want(self.by in LAYOUTS, "by is neither 'rows' nor 'list'")
        _want(valid_name(self.name), "name is not 1 to 64 letters, digits, '.', '_' or '-'")
        _want(self.metric in METRICS, "metric is none of 'l2', 'ip', 'cosine'")
        _want(all(isinstance(source, str) for source in self.sources), "sources are not strings")
        always, perhaps = KINDS[self.kind]
        _want(
            self.files.keys() - perhaps == set(always),
            f"files are not exactly {', '.join(always)}, with or without {', '.join(sorted(perhaps))}",
        )
        _want(self.shards == 1 or IDS in self.files, f"{IDS} is in every shard")
        _want((OWNERS in self.files) == (self.by == "list"), f"{OWNERS} is where vectors were spread by list")
        for name, record in self.files.items():
            _want(type(record.bytes) is int and record.bytes >= 0, f"the size of {name} is not a count of bytes")
            _want(
                isinstance(record.sha256, str) and _DIGEST.fullmatch(record.sha256) is not None,
                f"the sha256 of {name} is not 64 hex digits",
            )


def valid_name(name: str) -> bool:
    """Whether `name` can name an index (it becomes the service `search:<name>` too)."""
    return _NAME.fullmatch(name) is not None


def _want(holds: bool, fault: str) -> None:
    if not holds:
        raise ManifestError(fault)


def record_file(path: Path) -> FileRecord:
    """Size and sha256 of `path`, read in blocks. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def write_manifest(directory: Path, manifest: Manifest, *, sealed: bool = False) -> Path:
    """Writes `manifest.json` into `directory` and returns its path. Not atomic: the caller renames the directory.

    Of a sealed one every bit is checked when it is read; others may be edited by hand.
    """
    path = directory / MANIFEST
    path.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    if sealed:
        (directory / SEAL).write_text(record_file(path).sha256, encoding="ascii")
    return path


def read_manifest(directory: Path) -> Manifest:
    """The manifest of `directory`, once every file it names has the size and sha256 it says.

    Raises ManifestError for a missing directory or file, bad JSON, an unknown format, a bad field, another size or
    sha256.
    """
    if not directory.is_dir():
        raise ManifestError(f"{directory}: no such index directory; name one that `ralmq index build` wrote")
    manifest = load_manifest(directory)
    for name, wanted in manifest.files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != wanted.bytes:
                raise ManifestError(f"{path}: {size} bytes where the manifest says {wanted.bytes}; {_AGAIN}")
            if record_file(path).sha256 != wanted.sha256:
                raise ManifestError(f"{path}: its sha256 is not the manifest's, so it was changed or damaged; {_AGAIN}")
        except FileNotFoundError:
            raise ManifestError(f"{path}: the file is missing; {_AGAIN}") from None
        except OSError as fault:
            raise ManifestError(
                f"{path}: cannot be read ({fault.strerror}); mend its permissions or {_AGAIN}"
            ) from fault
    return manifest


def load_manifest(directory: Path) -> Manifest:
    """What `manifest.json` of `directory` says, its files not looked at. Raises ManifestError."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        if (directory / "shard-0").is_dir():
            count = len(list(directory.glob("shard-*")))
            all_of_them = f"or start a server for each with `ralmq up --index {directory}`"
            raise ManifestError(f"{directory}: holds {count} shards; give -o shard=0/{count}, {all_of_them}") from None
        raise ManifestError(f"{path}: the file is missing, so this is no index directory; {_AGAIN}") from None
    except OSError as fault:
        raise ManifestError(f"{path}: cannot be read ({fault.strerror}); mend its permissions or {_AGAIN}") from fault
    if len(raw) > _MAX_BYTES:
        raise ManifestError(f"{path}: over {_MAX_BYTES} bytes, so it is no manifest; {_AGAIN}")
    _check_seal(directory, raw)
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise ManifestError(f"{path}: not valid JSON; {_AGAIN}") from None
    version = found.get("format") if isinstance(found, dict) else None
    if not isinstance(found, dict) or version is None:
        raise ManifestError(f"{path}: holds no 'format' field, so it is no manifest; {_AGAIN}")
    if version != FORMAT:
        raise ManifestError(f"{path}: format {version!r}, this ralmq reads format {FORMAT}; upgrade ralmq or {_AGAIN}")
    try:
        return _manifest(found)
    except ManifestError as fault:
        raise ManifestError(f"{path}: {fault}; {_AGAIN}") from None


def _check_seal(directory: Path, raw: bytes) -> None:
    path = directory / SEAL
    try:
        sealed = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as fault:
        raise ManifestError(f"{path}: cannot be read ({fault.strerror}); mend its permissions or {_AGAIN}") from fault
    if sealed != hashlib.sha256(raw).hexdigest().encode():
        raise ManifestError(f"{path}: is not the sha256 of {MANIFEST}, so one of both was damaged; {_AGAIN}")


def _manifest(found: dict[str, Any]) -> Manifest:
    names = {field.name for field in fields(Manifest)}
    missing = sorted(names - found.keys())
    _want(not missing, f"lacks {', '.join(missing)}")
    unknown = sorted(found.keys() - names)
    _want(not unknown, f"has unknown fields {', '.join(unknown)}")
    sources, files = found["sources"], found["files"]
    _want(isinstance(sources, list), "sources are not a list")
    _want(isinstance(files, dict), "files are not an object")
    records = {}
    for name, record in files.items():
        _want(isinstance(record, dict) and record.keys() == {"bytes", "sha256"}, f"{name} has not 'bytes' and 'sha256'")
        records[name] = FileRecord(**record)
    return Manifest(**{**found, "sources": tuple(sources), "files": records})
