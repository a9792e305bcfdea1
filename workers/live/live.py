"""A live index: added to, deleted from and searched at once, on every kind that faiss knows. Knows no service.

Searches look at an immutable state; one thread logs changes and puts new states in place, another one merges segments.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...schema.errors import RalmqError, WorkerFailed
from . import merging, snapshot
from .base import Base
from .changes import LAST_ID, BadChange, Change, Room
from .log import Log, Logged
from .segments import Draft, Ids, Part, State, Vectors
from .view import LiveView

GROUP: Final = 1024  # changes that are written in one transaction at most
GROUP_ROWS: Final = 1 << 17  # vectors of one, unless a single change has more
LOGGED: Final = 1 << 18  # entries added or ended behind the last snapshot, and a quarter of all: time for another one
NONE: Final = np.empty(0, np.int64)

log = logging.getLogger("ralmq.index")


class LiveIndex:
    """The index itself; opened by opening.open_live. Every method is safe from any thread.

    Args:
        state: as it was read.
        nothing: a trained inverted file without vectors, where the segments of the state are such.
        lock: whatever is released when it is closed.
    """

    def __init__(
        self,
        changes: Log,
        base: Base | None,
        state: State,
        nothing: Any,
        *,
        threads: int = 1,
        lock: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        self.log = changes
        self.base = base
        self.said = base.said if base is not None else {}
        settings = changes.settings
        self.room = Room(settings.name, settings.dimension, settings.metric, settings.shard, settings.shards)
        self._lock = contextlib.ExitStack()
        if lock is not None:
            self._lock.enter_context(lock)
        self._threads = threads
        self._views: weakref.WeakSet[LiveView] = weakref.WeakSet()
        self._view = self._seen(state, nothing)
        self._changing = threading.Lock()  # whoever puts a view in place
        self._merging = threading.Lock()  # whoever merges, from its choice to its end
        self._ending = threading.Lock()  # so that nothing is asked behind the end
        self._asked: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._logged = 0  # since the last snapshot, or since it was opened
        self._closed = False
        self._writer = threading.Thread(target=self._write, name="live-log", daemon=True)
        self._merger = threading.Thread(target=self._tidy, name="live-merge", daemon=True)
        self._writer.start()
        self._merger.start()
        self._wake.set()

    def view(self) -> LiveView:
        """The state of now."""
        return self._view

    def submit(self, change: Change) -> Change:
        """Begins a change (see `room`); its future ends when it is on the disk and every later search sees it."""
        with self._ending:
            if self._closed:
                raise WorkerFailed(f"the index {self.room.name} is closed")
            change.done.set_running_or_notify_cancel()  # whoever waits may give up, the change goes on
            self._asked.put(change)
        return change

    def add(
        self, vectors: Vectors, ids: Ids | None = None, fields: Sequence[Any] | None = None, *, upsert: bool = False
    ) -> Ids:
        """Adds vectors [n, d], all or none, and returns their ids. Raises BadChange, WorkerFailed."""
        return self.submit(self.room.add(vectors, ids, fields, upsert=upsert)).done.result()

    def delete(self, ids: Ids) -> int:
        """Deletes ids and returns how many of them there were. Raises BadChange, WorkerFailed."""
        return int(self.submit(self.room.delete(ids)).done.result()[0])

    def snapshot(self) -> str:
        """Writes all that is there by now and returns its version. Raises BadChange, OSError, WorkerFailed."""
        with self._merging:
            view, self._logged = self._sealed(), 0
            kind = (self.log.settings.factory, view.nothing, view.state.metric)
            made = merging.merged(view.state.parts, *kind, self._threads)
            if made is None:
                raise BadChange(f"the index {self.room.name} holds nothing that could be written; add to it first")
            self._install(view.state.parts, made, view.nothing)
            texts = self._texts(view) if self.log.names or (self.base is not None and self.base.fielded) else None
            directory = self.log.path.parent
            snapshot.write(directory, made, self.log.settings, view.state.seq, texts, self.said)
            oldest = snapshot.prune(directory)
            if oldest > self.log.forgotten:
                self._forget(oldest)
        return snapshot.version(self.log.settings, view.state.seq)

    def settle(self) -> None:
        """Merges until nothing is left to merge; the thread of its own does the same in the background."""
        with self._merging:
            while not self._closed:
                view = self._view
                parts = merging.chosen(view.state.parts, self.log.settings.factory, view.nothing is not None)
                if not parts:
                    return
                self._merge(parts)

    def close(self) -> None:
        """Ends both threads, after what was begun, and lets another process have the directory."""
        with self._ending:
            if self._closed:
                return
            self._closed = True
            self._asked.put(None)
        self._wake.set()
        self._writer.join()
        self._merger.join()
        with self._merging:
            self.log.close()
            self._lock.close()

    # -- the thread that writes

    def _write(self) -> None:
        while True:
            group = list(self._group())
            if not group:
                return
            try:
                with self._changing:
                    done = self._commit(group)
            except Exception as error:  # the next group has its own chance
                log.exception("changes of %s failed", self.room.name)
                fault = WorkerFailed(f"{self.log.path}: cannot be written ({error}); make room on its disk")
                done = [(change, fault) for change in group]
            for change, answer in done:
                if isinstance(answer, Exception):
                    change.done.set_exception(answer)
                else:
                    change.done.set_result(answer)
            self._wake.set()

    def _group(self) -> Iterator[Change]:
        """The changes that wait by now, at least one; none at the end."""
        change = self._asked.get()
        rows = 0
        for _ in range(GROUP):
            if change is None:
                break
            yield change
            rows += 0 if change.vectors is None else len(change.vectors)
            if rows >= GROUP_ROWS:
                return
            try:
                change = self._asked.get_nowait()
            except queue.Empty:
                return
        if change is None:
            self._asked.put(None)  # ends the next group
        else:
            yield change

    def _commit(self, group: list[Change]) -> list[tuple[Change, NDArray[np.int64] | Exception]]:
        draft = Draft(self._view.state, self._view.state.seq)
        next_id = self.log.next_id
        logged: list[Logged] = []
        done: list[tuple[Change, NDArray[np.int64] | Exception]] = []
        known: dict[bytes, NDArray[np.int64]] = {}
        for change in group:
            try:
                answer = known.get(change.request) if change.request else None
                if answer is None and change.request:
                    answer = change.again(self.log.answered(change.request))
                if answer is None:
                    answer, next_id = self._draft(change, draft, next_id, logged)
                    known[change.request] = answer
                done.append((change, answer))
            except (RalmqError, sqlite3.Error) as error:
                done.append((change, error))
        if logged:
            after = draft.result()
            self.log.commit(logged, next_id)
            self._logged += sum(len(change.ids) + len(change.dead) for change in logged)
            self._put(after, self._view.nothing)
        return done

    def _draft(self, change: Change, draft: Draft, next_id: int, logged: list[Logged]) -> tuple[Ids, int]:
        """Takes one change into the draft; what it is answered with, and the next id that is free."""
        ids, vectors = change.ids, change.vectors
        if vectors is None:
            assert ids is not None
            dead = ids[draft.has(ids)]
            answer = np.array([len(dead)], np.int64)
            added, vectors = NONE, np.empty((0, self.room.dimension), np.float32)
        else:
            if ids is None:
                first = next_id + (self.room.shard - next_id) % self.room.shards
                if first + len(vectors) * self.room.shards >= LAST_ID:
                    raise BadChange(f"the index {self.room.name} has no free ids above its highest one; send ids")
                ids = np.arange(len(vectors), dtype=np.int64) * self.room.shards + first
            there = draft.has(ids)
            if there.any() and not change.upsert:
                raise BadChange(f"id {ids[there][0]} is there already; send upsert to replace it, or another id")
            dead, added, answer = ids[there], ids, ids
            next_id = max(next_id, int(ids.max()) + 1) if len(ids) else next_id
        draft.change(dead, added, vectors)
        request = (change.request, change.reply(answer))
        logged.append(Logged(draft.seq, dead, added, vectors, change.fields, change.names, *request))
        return answer, next_id

    def _put(self, state: State, nothing: Any) -> LiveView:
        """One assignment: a search sees the old view or the new one."""
        self._view = view = self._seen(state, nothing)
        return view

    def _seen(self, state: State, nothing: Any) -> LiveView:
        view = LiveView(self.log, self.base, self.said, state, nothing)
        self._views.add(view)
        return view

    # -- the thread that merges

    def _tidy(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            try:
                self.settle()
                if self._logged >= max(LOGGED, self._view.state.count // 4):
                    self.snapshot()
            except Exception:
                log.exception("merging or writing %s failed; its segments are served as they are", self.room.name)

    def _sealed(self) -> LiveView:
        """The view of now, whose parts no later add writes anew."""
        with self._changing:
            return self._put(self._view.state.sealed(), self._view.nothing)

    def _merge(self, parts: Sequence[Part]) -> None:
        chosen = {id(part.segment) for part in parts}
        view = self._sealed()
        before = [part for part in view.state.parts if id(part.segment) in chosen]
        factory, metric, nothing = self.log.settings.factory, view.state.metric, view.nothing
        if nothing is None:
            nothing = merging.trained(before, factory, metric, self._threads)
        self._install(before, merging.merged(before, factory, nothing, metric, self._threads), nothing)

    def _install(self, before: Sequence[Part], made: Any, nothing: Any) -> None:
        with self._changing:
            self._put(self._view.state.merged(before, made), nothing)

    def _texts(self, view: LiveView) -> Iterator[str]:
        """The fields of every entry, by ascending id."""
        ids = np.sort(np.concatenate([part.ids[part.living()] for part in view.state.parts]))
        for start in range(0, len(ids), 4096):
            some = ids[start : start + 4096]
            known = view.fields(some)
            yield from (json.dumps(known[number], ensure_ascii=False) for number in some.tolist())

    def _forget(self, seq: int) -> None:
        """Drops what is older than every snapshot, unless a search under way may still ask for it."""
        with self._changing:
            if min(view.state.seq for view in list(self._views)) >= seq:
                self.log.forget(seq)
