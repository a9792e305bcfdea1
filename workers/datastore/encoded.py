"""Texts to an index of their vectors, which a service `embed:<name>` makes of their passages. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...client.client import Client
from ...client.search import vectors_of
from ...schema.errors import WorkerFailed
from ..index.directory import check_replaceable
from ..index.fields import dump_fields
from ..index.manifest import Manifest
from ..index.progress import Progress, silent
from ..index.writer import OWN_FILES, check_name, write_vectors
from ..texts.passages import passages
from .build import in_thread
from .flight import several_at_once
from .sources import Document, SourceError

AT_ONCE: Final = 64  # texts of a request
IN_FLIGHT: Final = 4  # requests
_DEADLINE: Final = 600.0
_RESENDS: Final = 100


async def build_encoded(
    client: Client,
    *,
    encoder: str,
    name: str,
    documents: Sequence[Document],
    out: Path,
    sources: Sequence[str] = (),
    progress: Progress = silent,
    **how: Any,
) -> Manifest:
    """Writes the index directory `out` of the documents' passages, their vectors made by `embed:<encoder>`, atomically.

    The payload of an entry is its passage: {"document", "start", "text"}. `how`: fields of writer.Build, such as metric
    or shards. `progress(stage, done, total)` hears of encode, train and fill. Raises OutputError, SourceError,
    RalmqError, OSError.
    """
    check_name(name)
    check_replaceable(out, OWN_FILES)
    fields = passage_fields(documents)
    vectors = await embedded(client, encoder, [entry["text"] for entry in fields], progress)

    def write(told: Progress) -> Manifest:
        return write_vectors(
            out,
            name=name,
            vectors=vectors,
            fields=[dump_fields(entry) for entry in fields],
            encoder=encoder,
            sources=sources,
            progress=told,
            **how,
        )

    return await in_thread(write, progress)


def passage_fields(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """The passages of documents as payloads. Raises SourceError where there is none."""
    found = [
        {"document": document.name, "start": passage.start, "text": passage.text}
        for document in documents
        for passage in passages(document.text)
    ]
    if not found:
        raise SourceError("the sources hold no word; name others")
    return found


async def embedded(
    client: Client, encoder: str, texts: Sequence[str], progress: Progress = silent
) -> NDArray[np.float32]:
    """The vectors of texts, float32 [texts, d], as `embed:<encoder>` makes them, a few requests at a time.

    Raises RalmqError, such as NoService where nobody serves it.
    """
    parts: list[NDArray[np.float32] | None] = [None] * -(-len(texts) // AT_ONCE)
    done = 0

    async def encode(part: int) -> None:
        nonlocal done
        some = list(texts[part * AT_ONCE : (part + 1) * AT_ONCE])
        reply = await client.request(f"embed:{encoder}", {"texts": some}, deadline=_DEADLINE, retries=_RESENDS)
        found = np.array(vectors_of(reply), np.float32)
        if found.ndim != 2 or len(found) != len(some):
            raise WorkerFailed(f"embed:{encoder} gave no vector for each text: is another program serving it?")
        parts[part] = found
        done += len(some)
        progress("encode", done, len(texts))

    progress("encode", 0, len(texts))
    await several_at_once(IN_FLIGHT, range(len(parts)), encode)
    made = [part for part in parts if part is not None]
    if len({part.shape[1] for part in made}) > 1:
        raise WorkerFailed(f"embed:{encoder} became another model while it was asked; start again")
    return np.concatenate(made)
