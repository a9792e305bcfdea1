"""Tensors arrive bit for bit, small and large, in requests, replies and parts."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import ralmq
from inprocess import cluster
from ralmq.workers.base import Answer, Request
from ralmq.workers.echo import Echo

SIZES = [0, 1, 8 * 1024 - 1, 64 * 1024, 1 << 20, 40 << 20]  # bytes


def noise(size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inproc", [False, True])
async def test_a_tensor_comes_back_bit_for_bit(size: int, inproc: bool) -> None:
    sent = noise(size)
    async with cluster(Echo(), inproc=inproc) as here:
        client = await here.client()
        reply = await client.request("echo", {"size": size}, tensors=[sent])
        assert reply.body == {"size": size} and len(reply.tensors) == 1
        assert (reply.tensors[0].dtype, reply.tensors[0].shape) == ("u8", (size,))
        assert np.array_equal(reply.tensors[0].numpy(), sent)


async def test_many_tensors_of_many_kinds_and_sizes_at_once() -> None:
    kinds = ["<f4", "<f8", "<f2", "<i8", "<i4", "<u2", "|b1"]
    async with cluster(Echo(), Echo()) as here:
        clients = [await here.client() for _ in range(3)]

        async def ask(number: int) -> None:
            random = np.random.default_rng(number)
            sent = []
            for kind in kinds:
                shape = tuple(random.integers(0, 40, random.integers(0, 4)))
                size = int(np.prod(shape)) * np.dtype(kind).itemsize
                raw = random.integers(0, 2 if kind == "|b1" else 256, size, dtype=np.uint8)
                sent.append(np.frombuffer(raw.tobytes(), kind).reshape(shape))
            reply = await clients[number % 3].request("echo", {"number": number}, tensors=sent)
            assert reply.body == {"number": number}
            for got, wanted in zip(reply.tensors, sent, strict=True):
                array = got.numpy()
                assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
                assert array.tobytes() == wanted.tobytes()

        await asyncio.gather(*[ask(number) for number in range(200)])
        await here.idle()


class Blocks(ralmq.Worker):
    """Streams blocks of noise, each from its number; the FINAL holds the digest of all of them."""

    service = "blocks"

    async def handle(self, request: Request) -> AsyncIterator[Answer]:
        digest = hashlib.sha256()
        for number in range(request.body["count"]):
            block = noise(request.body["size"], number)
            digest.update(block.tobytes())
            yield {"number": number}, [block]
        request.ending["digest"] = digest.digest()


@pytest.mark.parametrize(("count", "size"), [(4000, 100), (500, 64 * 1024), (30, 1 << 20), (3, 40 << 20)])
async def test_parts_with_tensors(count: int, size: int) -> None:
    async with cluster(Blocks()) as here:
        client = await here.client()
        digest = hashlib.sha256()
        seen = 0
        stream = client.stream("blocks", {"count": count, "size": size}, deadline=120)
        async for part in stream:
            assert part.body == {"number": seen}
            digest.update(part.tensors[0].numpy().tobytes())
            seen += 1
        assert seen == count and stream.final is not None and stream.final.body == {"digest": digest.digest()}
        await here.idle()


async def test_large_requests_and_replies_while_small_ones_pass() -> None:
    large = noise(40 << 20)
    async with cluster(Echo()) as here:
        clients = [await here.client() for _ in range(2)]
        heavy = [asyncio.create_task(clients[0].request("echo", tensors=[large], deadline=120)) for _ in range(3)]
        light = [await clients[1].request("echo", {"n": n}) for n in range(100)]
        assert [reply.body["n"] for reply in light] == list(range(100))
        for task in heavy:
            assert np.array_equal((await task).tensors[0].numpy(), large)
