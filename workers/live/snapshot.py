"""The snapshots of a live index: directories that open as any other index. Knows files, no thread and no log."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np

from ..index.directory import replacing
from ..index.fields import write_fields
from ..index.manifest import FIELDS, IDS, MANIFEST, SEAL, VECTORS, Manifest, ManifestError, record_file, write_manifest
from ..index.segment import Segment
from ..index.store import OpenIndex, open_index
from .log import Settings
from .segments import part_of

FOLDER: Final = "snapshots"
KEPT: Final = 2  # the newest ones; should one be damaged, the other and the log behind it are enough
_OWN: Final = (VECTORS, IDS, FIELDS, MANIFEST, SEAL)

log = logging.getLogger("ralmq.index")


def write(
    directory: Path,
    segment: Segment,
    settings: Settings,
    seq: int,
    texts: Iterable[str] | None,
    said: dict[str, Any],
) -> Path:
    """Writes the state behind change `seq`, all of it in one segment, and returns its directory.

    Args:
        texts: the fields of each entry as JSON, by ascending id; None where none has any.
        said: what a datastore says of itself: model, fingerprint, tokens_per_payload.

    Raises OutputError, OSError.
    """
    out = directory / FOLDER / f"{seq:020d}"
    ids = part_of(segment).ids
    with replacing(out, _OWN) as fresh:
        faiss.write_index(segment.index, str(fresh / VECTORS))
        np.save(fresh / IDS, ids, allow_pickle=False)
        if texts is not None:
            write_fields(fresh / FIELDS, ids.tolist(), texts)
        kind = settings.factory if isinstance(segment.index, faiss.IndexIVF | faiss.IndexHNSW) else "Flat"
        count = segment.index.ntotal
        manifest = Manifest(
            name=settings.name,
            kind="vectors",
            dimension=settings.dimension,
            ntotal=count,
            total=count,
            metric=segment.metric,
            factory=kind,
            faiss_version=faiss.__version__,
            version=version(settings, seq),
            model=said.get("model", ""),
            fingerprint=said.get("fingerprint", ""),
            encoder=settings.encoder,
            tokens_per_payload=said.get("tokens_per_payload", 0),
            shard=settings.shard,
            shards=settings.shards,
            by="rows",
            sources=(),
            files={path.name: record_file(path) for path in sorted(fresh.iterdir())},
        )
        write_manifest(fresh, manifest, sealed=True)
    return out


def version(settings: Settings, seq: int) -> str:
    """What the answers of a snapshot are called by."""
    return f"{settings.version}-{seq}"


def place(directory: Path, version: str) -> Path:
    """Where the snapshot of that version lies."""
    return directory.absolute() / FOLDER / f"{int(version.rpartition('-')[2]):020d}"


def newest(directory: Path, settings: Settings, forgotten: int) -> tuple[int, OpenIndex] | None:
    """The newest snapshot that is whole, and the change it was written behind; None where there is none.

    A damaged one is left out with a word in the log, as long as the log of changes reaches behind an older one.
    """
    for seq, path in found(directory):
        if seq < forgotten:
            return None
        try:
            opened = open_index(path)
            if opened.manifest.version != version(settings, seq):
                raise ManifestError(f"{path}: is a snapshot of another index; move it away")
            return seq, opened
        except (ManifestError, OSError) as fault:
            log.warning("a snapshot is left out: %s", fault)
    return None


def found(directory: Path) -> list[tuple[int, Path]]:
    """All snapshots with their changes, the newest first."""
    folder = directory / FOLDER
    if not folder.is_dir():
        return []
    named = [(int(path.name), path) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(named, reverse=True)


def prune(directory: Path) -> int:
    """Removes all but the newest ones; the change behind which the oldest that is left was written, 0 for none.

    What a process left that was ended while it wrote one goes, too: one process at a time writes here.
    """
    kept = found(directory)
    for path in [*(path for _, path in kept[KEPT:]), *(directory / FOLDER).glob(".*")]:
        shutil.rmtree(path, ignore_errors=True)
    return kept[KEPT - 1][0] if len(kept) >= KEPT else 0
