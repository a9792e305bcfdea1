"""Making and opening live indexes: the lock of the directory, the newest snapshot, the log behind it. Knows files."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

import faiss

from ..index.directory import OutputError, shard_name
from ..index.factory import check_factory
from ..index.manifest import MANIFEST, METRICS, ManifestError, valid_name
from ..index.quantizer import METRICS as FAISS_METRICS
from ..texts.files import is_text
from . import merging, snapshot
from .base import Base
from .live import LiveIndex
from .log import LIVE, Log, Settings, create
from .segments import State, part_of

LOCK: Final = "live.lock"


def is_live(directory: Path) -> bool:
    """Whether a directory holds a live index, or changes to a built one."""
    return (directory / LIVE).is_file() and not is_text(directory)


def create_live(
    out: Path,
    *,
    name: str,
    dimension: int,
    metric: str = "l2",
    factory: str = "Flat",
    encoder: str = "",
    shards: int = 1,
) -> None:
    """Makes an empty live index in `out`, or in its folders shard-0, shard-1 ... Raises OutputError, OSError."""
    if not valid_name(name) or (encoder and not valid_name(encoder)):
        raise OutputError("a name is 1 to 64 letters, digits, '.', '_' or '-'; choose another")
    if metric not in METRICS:
        raise OutputError(f"{metric!r} is no metric; give {', '.join(METRICS)}")
    if dimension < 1 or shards < 1:
        raise OutputError("an index has at least 1 dimension and 1 shard")
    check_factory(factory)
    try:
        faiss.index_factory(dimension, factory, FAISS_METRICS[metric])
    except RuntimeError:
        raise OutputError(f"{factory!r} cannot hold {dimension} dimensions; PQ wants a multiple of its bytes") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out}: is not empty; choose another --out")
    version = os.urandom(8).hex()
    for shard in range(shards):
        at = out if shards == 1 else out / shard_name(shard)
        create(at, Settings(name, dimension, metric, factory, encoder, version, "", shard, shards))


def open_live(directory: Path, *, threads: int = 1) -> LiveIndex:
    """Opens a live index, or a built one to be changed from now on; nobody else may open it until it is closed.

    Its state is that of the newest whole snapshot and all changes behind it. Raises ManifestError.
    """
    if not directory.is_dir():
        raise ManifestError(f"{directory}: no such index directory; make one with `ralmq index create` or `build`")
    with contextlib.ExitStack() as opened:
        lock = Locked(directory)
        opened.callback(lock.close)
        base = None
        if not (directory / LIVE).exists():
            base = _begun(directory)
        log = Log(directory)
        opened.callback(log.close)
        settings = log.settings
        found = snapshot.newest(directory, settings, log.forgotten)
        if settings.base and base is None:
            base = Base(directory, found is None)
        if base is not None and base.sha256 != settings.base:
            raise ManifestError(f"{directory / LIVE}: holds changes of another build; move it away to serve this one")
        seq, segment = 0, None
        if found is not None:
            seq, segment = found[0], found[1].segment
        elif base is not None:
            segment = base.index.segment
        parts = () if segment is None else (part_of(segment),)
        blank = None if segment is None else merging.emptied(segment.index)
        metric = METRICS[METRICS.index(settings.metric)]
        state = State(metric, parts, seq).changed(log.seq, *log.since(seq))  # type: ignore[arg-type]
        opened.pop_all()
    return LiveIndex(log, base, state, blank, threads=threads, lock=contextlib.closing(lock))


def _begun(directory: Path) -> Base:
    """A built index, with an empty log of changes to it."""
    if not (directory / MANIFEST).is_file() or is_text(directory):
        raise ManifestError(f"{directory}: is no index of vectors; make one with `ralmq index create` or `build`")
    base = Base(directory, True)
    manifest = base.index.manifest
    if manifest.shards > 1 and (base.ids % manifest.shards != manifest.shard).any():
        raise ManifestError(f"{directory}: its ids are not those with id % {manifest.shards} == {manifest.shard}")
    place = (manifest.shard, manifest.shards)
    about = (manifest.name, manifest.dimension, manifest.metric, manifest.factory, manifest.encoder)
    create(directory, Settings(*about, manifest.version, base.sha256, *place), manifest.total)
    return base


class Locked:
    """A directory that no other process may open, until it is closed or this process ends."""

    def __init__(self, directory: Path) -> None:
        """Raises ManifestError where another one holds it."""
        path = directory / LOCK
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as fault:
            raise ManifestError(f"{path}: cannot be opened ({fault.strerror}); mend its permissions") from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise ManifestError(
                f"{directory}: is served already, and a live index by one process alone; stop that one, or serve a "
                "snapshot of it"
            ) from None

    def close(self) -> None:
        """Others may open it from now on."""
        os.close(self._handle)
