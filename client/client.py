"""The asynchronous API: connect, request, stream, generate, search, status. Knows service names, no transport."""

import asyncio
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zmq

from ..schema.address import BROKER_VARIABLE, DEFAULT_BROKER
from ..schema.errors import Busy, Refused
from ..schema.limits import MAX_DEADLINE_MS
from ..schema.message import Final, Hello
from . import changes
from .fanout import Fanout, Layout
from .generation import Generation, generation_request
from .link import Link
from .pending import WINDOW, Pending
from .results import Array, Hits, Reply
from .search import encoder_of, hits_of, is_text, rows_of, search_body, vectors_of
from .stream import Stream, pause

REQUEST_DEADLINE = 30.0  # seconds
GENERATION_DEADLINE = 600.0
AGAIN = 8  # resends after Busy of a generation that is under way


def connect(
    url: str | None = None,
    *,
    wait: float = 5.0,
    name: str = "client",
    context: zmq.Context[Any] | None = None,
    keys: str | os.PathLike[str] | None = None,
) -> "Client":
    """A client of the broker at `url`; opened by `async with`.

    Args:
        url: tcp://host:port, ipc://path or inproc://name; $RALMQ_BROKER where not given, else tcp://127.0.0.1:5555.
        wait: seconds to wait for the broker.
        keys: a key file or a folder of keys, for a broker that asks for one; $RALMQ_KEYS where not given.
    """
    if url is None:
        url = os.environ.get(BROKER_VARIABLE) or DEFAULT_BROKER
    return Client(Link(url, Hello(bytes(16), name), context=context, keys=keys), wait)


def _end(deadline: float) -> float:
    """Loop time at which a call must have ended.

    Raises:
        Refused: a deadline that is no number of seconds above 0.
    """
    if not 0 < deadline < MAX_DEADLINE_MS / 1000:
        raise Refused(f"a deadline of {deadline} s is out of range: give seconds above 0")
    return asyncio.get_running_loop().time() + deadline


class Client:
    """Asks services by name. Every call takes `deadline` (seconds) and ends by then, with an answer or an error."""

    def __init__(self, link: Link, wait: float) -> None:
        self._link = link
        self._wait = wait
        self._layouts: dict[str, Layout] = {}

    async def __aenter__(self) -> Self:
        await self._link.open(self._wait)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()

    async def request(
        self,
        service: str,
        body: dict[str, Any] | None = None,
        *,
        tensors: Sequence[Any] = (),
        deadline: float = REQUEST_DEADLINE,
        priority: int = 4,
        wait_service: float = 0.0,
        retries: int = 0,
        parent: bytes | None = None,
    ) -> Reply:
        """One request, one reply.

        Args:
            body: what msgpack holds: text keys, numbers, text, bytes, lists, maps.
            tensors: numpy arrays or torch tensors.
            priority: 0 to 9, higher first.
            wait_service: seconds to wait for a service that nobody offers yet.
            retries: resends after Busy, each after the time that the broker computed.
            parent: the request on whose behalf this one asks: its end and its deadline end this one too.

        Raises:
            RalmqError: one class per cause, see ralmq.errors.
        """
        loop = asyncio.get_running_loop()
        end = _end(deadline)
        while True:
            pending = self._link.ask(
                service,
                body,
                tensors,
                deadline=max(0.001, end - loop.time()),
                priority=priority,
                window=WINDOW,
                parent=parent,
                wait_service=wait_service,
            )
            try:
                while not isinstance(part := await pending.next(), Final):
                    pass  # a service that streams, asked for its end alone
                return Reply(part.body, tuple(part.tensors))
            except Busy as busy:
                if not retries:
                    raise
                retries -= 1
                await pause(busy, end)
            finally:
                self._link.cancel(pending)

    def stream(
        self,
        service: str,
        body: dict[str, Any] | None = None,
        *,
        tensors: Sequence[Any] = (),
        deadline: float = REQUEST_DEADLINE,
        priority: int = 4,
        wait_service: float = 0.0,
        retries: int = 0,
        parent: bytes | None = None,
        window: int = WINDOW,
        credit: Callable[[], int] | None = None,
    ) -> Stream:
        """One request, many parts: `async for part in client.stream(...)`.

        Args:
            window: parts that may be under way; a reader that is slow pauses its own stream alone.
            credit: in place of it, gives how many parts may have been sent, counted from the first (0: no bound), where
                this stream feeds another one; `Stream.granted` is called when that has grown.
        """
        loop = asyncio.get_running_loop()
        end = _end(deadline)

        def ask() -> Pending:
            pending = self._link.ask(
                service,
                body,
                tensors,
                deadline=max(0.001, end - loop.time()),
                priority=priority,
                window=window if credit is None else credit(),
                parent=parent,
                wait_service=wait_service,
            )
            pending.paced = credit is None
            return pending

        return Stream(self._link, ask, retries, end, credit)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str,
        deadline: float = GENERATION_DEADLINE,
        wait_service: float = 0.0,
        retries: int = 0,
        priority: int = 4,
        **options: Any,
    ) -> Generation:
        """Text from a prompt (text or token ids): `async for token in client.generate(...)`.

        Args:
            model: which model; the service is generate:<model>.
            **options: max_tokens, min_tokens, temperature (0 = greedy), top_k, top_p, min_p, repetition_penalty,
                presence_penalty, frequency_penalty, logit_bias, seed, n, stop, stop_ids, ignore_eos, logprobs,
                top_logprobs, echo, hooks; for retrieval: retrieve (name of the index), policy, interval, staleness, k,
                nprobe, knn_lambda, knn_temperature, ngram_lambda, order, stride, template, query_tokens, chunks,
                passages. See generation.DEFAULTS, docs/sampling.md and docs/retrieval-policies.md.

        Raises:
            TypeError: an option that does not exist.
        """
        body, tensors = generation_request(prompt, options)
        loop = asyncio.get_running_loop()
        end = _end(deadline)

        def ask(more: dict[str, Any]) -> Stream:
            left = max(0.001, end - loop.time())
            return self.stream(
                f"generate:{model}",
                {**body, **more},
                tensors=tensors,
                deadline=left,
                wait_service=left if more else wait_service,  # a generator that was there may be back soon
                retries=max(retries, AGAIN) if more else retries,
                priority=priority,
            )

        async def status() -> dict[str, Any]:
            return await self.status(deadline=max(0.001, end - loop.time()))

        return Generation(ask, status, body.get("n", 1))

    async def search(
        self,
        index: str,
        query: Any,
        *,
        k: int = 10,
        nprobe: int | None = None,
        ef: int | None = None,
        filter: dict[str, Any] | None = None,
        exact: bool = False,
        lists: tuple[Any, Any] | None = None,
        payloads: bool = True,
        partial: bool = False,
        deadline: float = REQUEST_DEADLINE,
        wait_service: float = 0.0,
        retries: int = 0,
    ) -> Hits:
        """Nearest neighbours in an index, whole or in shards.

        Args:
            query: float32 [queries, d] or [d]; or text or a list of texts, which an index of vectors has encoded by the
                encoder that it names.
            nprobe, ef: how far an IVF, an HNSW index looks; None for the index's own default.
            filter: which payloads count, as {"lang": "de", "year": {"gte": 2020}}; see docs/retrieval.md.
            exact: compare with every vector.
            lists: lists to look at that the asker chose: ids int64 [queries, nprobe] and the queries'
                distances to their centroids, float32 of the same shape.
            payloads: also what the index knows of each neighbour; leave it out for thousands of neighbours.
            partial: do without shards that are lost or late; `Hits.coverage` says how much was searched.
        """
        fanout, end = self._fanout(deadline, wait_service, retries)
        if is_text(query):
            texts = [query] if isinstance(query, str) else list(query)
            encoder = encoder_of((await fanout.layout(index, end)).info)
            if not encoder:
                body = search_body(payloads, text=texts, k=k, filter=filter)
                return hits_of(await fanout.search(index, body, (), end, partial=partial))
            query = vectors_of(await fanout.ask(encoder, {"texts": texts}, (), end))
        known = search_body(payloads, k=k, nprobe=nprobe, ef=ef, filter=filter, exact=exact or None)
        body = {**known, "following": False, **({"lists": True} if lists is not None else {})}
        return hits_of(await fanout.search(index, body, [rows_of(query), *(lists or ())], end, partial=partial))

    async def search_reply(
        self,
        index: str,
        body: dict[str, Any],
        tensors: Sequence[Any],
        *,
        deadline: float = REQUEST_DEADLINE,
        wait_service: float = 0.0,
        retries: int = 0,
        priority: int = 4,
    ) -> Reply:
        """The reply of `search:<index>` as it is, shards merged: for what needs more of it than `search` gives."""
        fanout, end = self._fanout(deadline, wait_service, retries, priority)
        return await fanout.search(index, body, tensors, end)

    async def add(
        self,
        index: str,
        vectors: Any = None,
        ids: Any = None,
        fields: Sequence[dict[str, Any]] | None = None,
        *,
        upsert: bool = False,
        deadline: float = REQUEST_DEADLINE,
        wait_service: float = 0.0,
        retries: int = 0,
    ) -> Array:
        """Adds to a live index; its ids, int64 [n]. They are on the disk then, and every later search sees them.

        Large ones go in several requests, each of which is done as a whole or not at all.

        Args:
            vectors: float32 [n, d] or [d]; None for an index of texts.
            ids: int64 [n], from 0 on; None and the index gives them.
            fields: a map for each, its payload; filters name its keys. For an index of texts each holds a `text`.
            upsert: replace what has one of the ids; else such an id is refused.
        """
        fanout, end = self._fanout(deadline, wait_service, retries)
        layout = await fanout.layout(index, end)
        return await changes.add(fanout.ask, index, layout, vectors, ids, fields, upsert, end)

    async def delete(
        self,
        index: str,
        ids: Any,
        *,
        deadline: float = REQUEST_DEADLINE,
        wait_service: float = 0.0,
        retries: int = 0,
    ) -> int:
        """Deletes ids from a live index; how many of them there were."""
        fanout, end = self._fanout(deadline, wait_service, retries)
        return await changes.delete(fanout.ask, index, await fanout.layout(index, end), ids, end)

    async def snapshot(
        self, index: str, *, deadline: float = GENERATION_DEADLINE, wait_service: float = 0.0, retries: int = 0
    ) -> list[str]:
        """Writes a snapshot of a live index; its version, of each shard."""
        fanout, end = self._fanout(deadline, wait_service, retries)
        return await changes.on_each(fanout.ask, index, await fanout.layout(index, end), {"snapshot": True}, end)

    async def use(
        self,
        index: str,
        directory: str | os.PathLike[str],
        *,
        deadline: float = GENERATION_DEADLINE,
        wait_service: float = 0.0,
        retries: int = 0,
    ) -> list[str]:
        """Puts another index in the place of a served one, under load; its version, of each shard.

        Args:
            directory: where its server finds it.
        """
        fanout, end = self._fanout(deadline, wait_service, retries)
        body = {"open": os.path.abspath(os.path.expanduser(directory))}
        return await changes.on_each(fanout.ask, index, await fanout.layout(index, end), body, end)

    def _fanout(self, deadline: float, wait_service: float, retries: int, priority: int = 4) -> tuple[Fanout, float]:
        """What asks an index, and the loop time by which a call must have ended."""
        loop = asyncio.get_running_loop()

        async def ask(service: str, body: dict[str, Any], tensors: Sequence[Any], end: float) -> Reply:
            left = max(0.001, end - loop.time())
            return await self.request(
                service,
                body,
                tensors=tensors,
                deadline=left,
                wait_service=wait_service,
                retries=retries,
                priority=priority,
            )

        return Fanout(ask, self._layouts), _end(deadline)

    async def status(self, *, deadline: float = REQUEST_DEADLINE) -> dict[str, Any]:
        """Broker, workers, services and pipelines, as plain data."""
        return (await self.request("ralmq.status", deadline=deadline)).body
