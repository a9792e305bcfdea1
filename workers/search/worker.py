"""The built-in worker `index`: an index directory served as `search:<name>`. What it answers is in answer.py."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...schema.errors import Refused
from ...schema.message import Beat
from ..base import Answer, Request, Worker
from ..batching import Batcher
from ..index.directory import shard_name
from ..index.manifest import valid_name
from ..index.query import Source
from ..index.store import OpenIndex
from ..live.answer import OPEN, changed, close_source, is_change, open_source, other_path
from ..live.live import LiveIndex
from ..texts.answer import answer_text
from ..texts.files import is_text
from ..texts.index import TextIndex
from .answer import Asked, answers
from .recall import Recall

TEXTS = "texts"
_SHARD = re.compile(r"(\d{1,4})/(\d{1,4})")


class Index(Worker):
    """The built-in worker `index`.

    Args:
        index: the directory that `ralmq index build` wrote.
        name: the service is search:<name>; by default the name in the manifest.
        shard: of an index in shards, which one is served: 1/4 is the second of four, search:<name>/1.
        threads: of one call of faiss.
        live: take changes to an index that was built, too; one that was made by `ralmq index create` always does.
        batch: searches that are answered in one call at most.
        wait_ms: how long a search waits for others to come along; whatever comes during a call waits for it anyway.
        mmap: map the vectors into memory instead of reading them, for an index that is larger than it.
        nprobe: lists that a search looks into where its request names no number (0: 8).
        ef: the same for the candidates of a graph (0: 64).
        recall: share of the queries that are repeated exactly, for the gauge `recall`.
        recall_goal: choose nprobe or ef so that the recall is at least so much, for requests that name none (0: no).

    Raises:
        Refused: an option that cannot be. `start` raises ManifestError, which is one too.
    """

    idempotent = True

    def __init__(
        self,
        *,
        index: Path,
        name: str = "",
        shard: str = "",
        threads: int = 1,
        live: bool = False,
        batch: int = 256,
        wait_ms: float = 0.0,
        mmap: bool = False,
        nprobe: int = 0,
        ef: int = 0,
        recall: float = 0.01,
        recall_goal: float = 0.0,
    ) -> None:
        if name and not valid_name(name):
            raise Refused(f"-o name={name}: a name is 1 to 64 letters, digits, '.', '_' or '-'")
        for option, number, least in (
            ("threads", threads, 1),
            ("batch", batch, 1),
            ("nprobe", nprobe, 0),
            ("ef", ef, 0),
        ):
            if number < least:
                raise Refused(f"-o {option}={number}: give at least {least}")
        if not 0 <= wait_ms <= 1000:
            raise Refused(f"-o wait_ms={wait_ms:g}: give 0 to 1000 milliseconds")
        for option, share in (("recall", recall), ("recall_goal", recall_goal)):
            if not 0 <= share <= 1:
                raise Refused(f"-o {option}={share:g}: give 0 to 1")
        self._path = index.expanduser()
        self._name, self._place = name, _place(shard)
        self._threads, self._mmap, self._live = threads, mmap, live
        self._efforts = nprobe or None, ef or None
        self._share, self._goal = recall, recall_goal
        self._batcher = Batcher(_Together(self, batch, wait_ms / 1000))
        self.capacity = 2 * batch  # the next one fills while one is answered
        self._held: tuple[Source, Recall] | None = None  # one assignment puts another version in place
        self._swapping = asyncio.Lock()
        self._text: TextIndex | None = None
        self._services: tuple[str, ...] = ()
        self._calls = ThreadPoolExecutor(1, "search")
        self._counts = {"searches": 0, "calls": 0}

    @property
    def services(self) -> tuple[str, ...]:
        return self._services

    async def start(self) -> None:
        """Reads the index; only then is its service announced. Raises ManifestError."""
        path = self._shard_of(self._path)
        if is_text(path):
            if self._place not in (None, (0, 1)):
                raise Refused(f"{path}: an index of texts has no shards; leave -o shard away")
            self._text = await asyncio.to_thread(TextIndex, path)
            self._services = (f"search:{self._name or self._text.manifest.name}",)
            self.identity = TEXTS
            return
        opened = await self._opened(path, self._live)
        info = opened.view().info()
        self._place = (info["shard"], info["shards"])
        service = f"search:{self._name or info['name']}"
        self._services = (service,) if info["shards"] == 1 else (service, f"{service}/{info['shard']}")
        self.identity = _identity(info)
        self._hold(opened)

    def _shard_of(self, path: Path) -> Path:
        own = None if self._place is None else path / shard_name(self._place[0])
        return own if own is not None and own.is_dir() else path

    async def _opened(self, path: Path, live: bool) -> OpenIndex | LiveIndex:
        how = partial(open_source, path, live=live, mmap=self._mmap, threads=self._threads)
        opening = asyncio.ensure_future(asyncio.to_thread(how))
        try:
            opened = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_let_go)  # a thread cannot be cancelled
            raise
        info, effort = opened.view().info(), self._efforts[0]
        fault = ""
        if self._place not in (None, (info["shard"], info["shards"])):
            fault = f"{path}: holds shard {info['shard']} of {info['shards']}; mend -o shard"
        elif effort is not None and 0 < info["nlist"] < effort:
            fault = f"-o nprobe={effort}: the index has {info['nlist']} lists"
        if fault:
            close_source(opened)
            raise Refused(fault)
        return opened

    def _hold(self, opened: OpenIndex | LiveIndex) -> None:
        info = opened.view().info()
        graph = info["factory"].startswith("HNSW")
        effort = self._efforts[1] if graph else self._efforts[0] if info["factory"].startswith("IVF") else None
        recall = Recall(self._share, self._goal, effort, info["nlist"], graph)
        recall.start()
        self._held = opened, recall

    async def _change(self, request: Request) -> Answer:
        """See `changed`; {"open": directory} puts another version in place, after the search that is under way."""
        assert self._held is not None
        if OPEN not in request.body:
            return await changed(self._held[0], request, whole=request.service == self._services[0])
        path, folder = other_path(request.body), self._path.absolute().parent.resolve()
        if not path.resolve().is_relative_to(folder):  # an asker must not make the server read what it likes
            raise Refused(f"{path}: only what lies in {folder} may take its place: put it there")
        async with self._swapping:
            opened = await self._alike(self._shard_of(path))
            index, recall = self._held
            before = index.view().info()["version"]
            self._hold(opened)

            def close() -> None:
                recall.stop()
                close_source(index)

            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._calls, close))
        return {"version": opened.view().info()["version"], "before": before}

    async def _alike(self, path: Path) -> OpenIndex | LiveIndex:
        """An index that may take the place of this one, since askers are not told. Raises Refused, ManifestError."""
        if await asyncio.to_thread(is_text, path):
            other = TEXTS
        else:
            opened = await self._opened(path, False)
            other = _identity(opened.view().info())
            if other == self.identity:
                return opened
            close_source(opened)
        raise Refused(
            f"{path}: holds {other}, and {self._services[0]} serves {self.identity}: "
            "serve it under a name of its own, with `ralmq worker index -o name=`"
        )

    async def stop(self) -> None:
        await self._batcher.close()
        self._calls.shutdown(wait=False, cancel_futures=True)
        if self._held is not None:
            await asyncio.to_thread(self._held[1].stop)
            await asyncio.to_thread(close_source, self._held[0])
        if self._text is not None:
            self._text.close()

    def beat(self, beat: Beat) -> Beat:
        """With the gauges: searches, calls of faiss that answered them, and what Recall measures."""
        return replace(beat, gauges=self._counts | ({} if self._held is None else self._held[1].gauges))

    def handle(self, request: Request) -> Awaitable[Answer]:
        """See `answers`; answered together with others that came. For changes see `changed`."""
        if self._text is None and is_change(request.body):
            return self._change(request)
        return self._batcher.submit(request)

    async def handle_batch(self, requests: list[Request]) -> list[Answer]:
        """The search runs beside the loop, so that beats and other requests go on."""
        whole = self._services[0]
        asked = [
            Asked(request.body, [tensor.numpy() for tensor in request.tensors], request.service == whole, request.id)
            for request in requests
        ]
        loop, given_up = asyncio.get_running_loop(), threading.Event()
        search = loop.run_in_executor(self._calls, self._answers, asked, given_up)
        try:
            return await asyncio.shield(search)
        except asyncio.CancelledError:
            given_up.set()
            await asyncio.wait([search])  # a thread cannot be cancelled: its credit comes back when it has ended
            if not search.cancelled():
                search.exception()  # seen, so that asyncio does not report it
            raise

    def _answers(self, asked: Sequence[Asked], given_up: threading.Event) -> list[Any]:
        self._counts["searches"] += len(asked)
        if self._text is not None:
            return [_tried(self._text, request, given_up) for request in asked]
        assert self._held is not None
        source, recall = self._held
        index = source.view()

        def seen(params: Any, queries: Any, found: Any) -> None:
            self._counts["calls"] += 1
            recall.offer(index, params, queries, found)

        how: dict[str, Any] = {"effort": recall.effort, "seen": seen, "given_up": given_up.is_set}
        return list(answers(index, asked, threads=self._threads, **how))


def _let_go(opening: asyncio.Future[OpenIndex | LiveIndex]) -> None:
    """Closes what was opened for somebody who did not wait for it, beside the loop."""
    if not opening.cancelled() and opening.exception() is None:
        asyncio.get_running_loop().run_in_executor(None, close_source, opening.result())


def _tried(index: TextIndex, asked: Asked, given_up: threading.Event) -> Any:
    try:
        return answer_text(index, asked.body, asked.arrays, given_up.is_set, asked.id)
    except Exception as error:  # fails alone
        return error


class _Together(Worker):
    """Hands batches to an Index, whose `handle` stays the way in for a single request."""

    def __init__(self, index: Index, max_batch: int, max_wait: float) -> None:
        self.max_batch, self.max_wait = max_batch, max_wait
        self.handle_batch = index.handle_batch  # type: ignore[method-assign]


def _identity(info: Mapping[str, Any]) -> str:
    """What replicas, and versions that follow one another, have in common; whatever else they hold."""
    origin = info["encoder"] or info["fingerprint"]
    return f"vectors of {info['d']} dimensions, {info['metric']}" + (f", of {origin}" if origin else "")


def _place(shard: str) -> tuple[int, int] | None:
    if not shard:
        return None
    match = _SHARD.fullmatch(shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise Refused(f"-o shard={shard}: give the shard and how many there are, as 1/4 for the second of four")
    return int(match[1]), int(match[2])
