"""A client of the published RALM format by its description alone, and an index that answers as a test wants."""

import asyncio
import struct
from typing import Any, Self

import faiss
import numpy as np
from ralmq.workers.base import Answer, Request, Worker

B, D, K, NPROBE, NLIST = 32, 512, 10, 32, 64
Array = np.ndarray[Any, Any]
DRAW = np.random.default_rng(4)
VECTORS: Array = DRAW.normal(size=(3000, D)).astype(np.float32)


def queries(seed: int, batch: int = B) -> Array:
    return np.random.default_rng(seed).normal(size=(batch, D)).astype(np.float32)


def request(asked: Array, k: int = K) -> bytes:
    return struct.pack(">I", k) + asked.astype("<f4").tobytes()


def request_with_lists(asked: Array, lists: Array, k: int = K) -> bytes:
    head = struct.pack(">IIII", len(asked), asked.shape[1], lists.shape[1], k)
    return head + asked.astype("<f4").tobytes() + lists.astype("<i8").tobytes()


def answer(raw: bytes, batch: int = B, k: int = K) -> tuple[Array, Array]:
    """ids, distances."""
    ids = np.frombuffer(raw[: 8 * batch * k], "<i8").reshape(batch, k)
    return ids, np.frombuffer(raw[8 * batch * k :], "<f4").reshape(batch, k)


def inverted(factory: str = f"IVF{NLIST},Flat") -> faiss.IndexIVF:
    index = faiss.index_factory(D, factory)
    index.train(VECTORS)
    index.add(VECTORS)
    index.nprobe = NPROBE
    return index


class Caller:
    """One connection."""

    def __init__(self, port: int, *, coordinator: bool) -> None:
        self._port = port
        self._coordinator = coordinator

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        if self._coordinator:
            self.writer.write(b"\0\0\0\1")
            assert await self.reader.readexactly(4) == b"\0\0\0\1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, raw: bytes) -> tuple[Array, Array]:
        self.writer.write(raw)
        return answer(await self.reader.readexactly(B * K * 12))


class Shelf(Worker):
    """`search:shelf` over a faiss index in memory, with the fields of an index server; keeps what it was asked.

    Args:
        together: so many searches are answered at once, the last first, when all of them are in.
    """

    service = "search:shelf"
    capacity = 64

    def __init__(self, index: Any, together: int = 1, metric: str = "l2") -> None:
        self.index = index
        self.metric = metric
        self.together = together
        self.bodies: list[dict[str, Any]] = []
        self.quantizers = 0
        self._waiting: list[asyncio.Future[None]] = []

    async def handle(self, request: Request) -> Answer:
        body, index = request.body, self.index
        if body.get("info"):
            return {"kind": "vectors", "d": D, "metric": self.metric, "nlist": index.nlist, "version": "1"}
        if body.get("quantizer"):
            self.quantizers += 1
            centroids = index.quantizer.reconstruct_n(0, index.nlist)
            return {"metric": self.metric, "nlist": index.nlist}, [centroids, np.zeros(index.nlist, np.int32)]
        self.bodies.append(body)
        arrays = [tensor.numpy().copy() for tensor in request.tensors]
        if body.get("lists"):
            asked, lists, coarse = arrays
            assert (lists.dtype, coarse.dtype, coarse.shape) == (np.int64, np.float32, lists.shape)
            distances, ids = index.search_preassigned(asked, body["k"], lists, coarse)
        else:
            [asked] = arrays
            distances, ids = index.search(asked, body["k"])
        await self._all_in()
        return {}, [ids, distances]

    async def _all_in(self) -> None:
        if self.together < 2:
            return
        self._waiting.append(mine := asyncio.get_running_loop().create_future())
        if len(self._waiting) == self.together:
            for waiting in reversed(self._waiting):
                waiting.set_result(None)
            self._waiting.clear()
        await mine
