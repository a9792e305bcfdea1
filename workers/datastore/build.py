"""The asking side of `index build`: texts in, an index directory of a model's hidden states out. Knows no torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...client.client import Client
from ..index.manifest import Manifest
from ..index.progress import Progress, silent
from ..index.writer import Build, check_build, write_index
from .score import IN_FLIGHT, describe, score
from .sources import Document
from .tokenized import tokenize


class _Stopped(Exception):
    """Ends the writing thread once its asker was cancelled."""


async def build_datastore(
    client: Client,
    *,
    model: str,
    name: str,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    out: Path,
    max_tokens: int | None = None,
    sources: Sequence[str] = (),
    in_flight: int = IN_FLIGHT,
    progress: Progress = silent,
    **how: Any,
) -> Manifest:
    """Scores `documents` with `lm:<model>` over `client` and writes the index directory `out`, atomically.

    An entry's key is the hidden state at the last layer's FFN input, its value the next token (kNN-LM, Khandelwal et
    al., 2020); each token but a document's last is an entry once. The directory carries `tokenizer`, so that the index
    can give its passages as text. `how`: fields of writer.Build, such as factory or shards. `progress(stage, done,
    total)` hears of the stages tokenize, score, train and fill, the last two from another thread. Raises OutputError,
    SourceError, RalmqError, OSError.
    """
    check_build(out, name, Build(**how))
    progress("tokenize", 0, 1)
    stream = (await asyncio.to_thread(tokenize, documents, tokenizer, max_tokens)).stream
    progress("tokenize", 1, 1)
    info = await describe(client, model)
    check_build(out, name, Build(**how), total=len(stream.entries()), width=info.d)
    scored = await score(client, model=model, stream=stream, in_flight=in_flight, progress=progress)

    def write(told: Progress) -> Manifest:
        return write_index(
            out,
            name=name,
            vectors=scored.hidden,
            stream=stream,
            entries=scored.entries,
            model=model,
            fingerprint=scored.info.fingerprint,
            tokenizer=tokenizer.to_str(),
            sources=sources,
            progress=told,
            **how,
        )

    return await in_thread(write, progress)


async def in_thread(write: Callable[[Progress], Manifest], progress: Progress) -> Manifest:
    """Runs `write` beside the loop; when cancelled, waits until the thread has stopped and taken its files with it."""
    stop = threading.Event()

    def told(stage: str, done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(stage, done, total)

    writing = asyncio.ensure_future(asyncio.to_thread(write, told))
    try:
        return await asyncio.shield(writing)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([writing])
        if not writing.cancelled():
            writing.exception()  # seen, so that asyncio does not report it
        raise
