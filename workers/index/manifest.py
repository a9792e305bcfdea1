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

FORMAT = 1
MANIFEST = "manifest.json"
VECTORS = "index.faiss"
PAYLOADS = "payloads.npy"
ENTRIES = "entries.npy"
TOKENS = "tokens.npy"
DOCUMENTS = "documents.json"
TOKENIZER = "tokenizer.json"
FILES = (VECTORS, PAYLOADS, ENTRIES, TOKENS, DOCUMENTS)  # of every index; TOKENIZER only where its texts can be read

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
    """One index: `ntotal` float32 vectors of `dimension`, each with `tokens_per_payload` following token ids.

    `fingerprint` is that of the model whose hidden states the vectors are; `factory` is faiss's own index string;
    `files` are those that every index has and, where its tokens can be decoded, the tokenizer.
    Raises ManifestError on a field out of its range.
    """

    name: str
    dimension: int
    ntotal: int
    metric: Literal["l2", "ip"]
    factory: str
    faiss_version: str
    model: str
    fingerprint: str
    tokens_per_payload: int
    sources: tuple[str, ...]
    files: dict[str, FileRecord]
    format: int = FORMAT

    def __post_init__(self) -> None:
        for field in ("name", "factory", "faiss_version", "model", "fingerprint"):
            _want(isinstance(getattr(self, field), str), f"{field} is not a string")
        for field in ("dimension", "ntotal", "tokens_per_payload"):
            _want(type(getattr(self, field)) is int and getattr(self, field) > 0, f"{field} is not a positive integer")
        _want(valid_name(self.name), "name is not 1 to 64 letters, digits, '.', '_' or '-'")
        _want(self.metric in ("l2", "ip"), "metric is neither 'l2' nor 'ip'")
        _want(all(isinstance(source, str) for source in self.sources), "sources are not strings")
        _want(
            self.files.keys() - {TOKENIZER} == set(FILES),
            f"files are not exactly {', '.join(FILES)}, with or without {TOKENIZER}",
        )
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


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Writes `manifest.json` into `directory` and returns its path. Not atomic: the caller renames the directory."""
    path = directory / MANIFEST
    path.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
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
        raise ManifestError(f"{path}: the file is missing, so this is no index directory; {_AGAIN}") from None
    except OSError as fault:
        raise ManifestError(f"{path}: cannot be read ({fault.strerror}); mend its permissions or {_AGAIN}") from fault
    if len(raw) > _MAX_BYTES:
        raise ManifestError(f"{path}: over {_MAX_BYTES} bytes, so it is no manifest; {_AGAIN}")
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
