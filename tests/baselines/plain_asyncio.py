"""A broker as one writes it first: zmq.asyncio, one ROUTER, whole messages, a table from request id to asker.

`python plain_asyncio.py URL`. No credits, deadlines, fences or checks; workers take turns.
"""

import asyncio
import itertools
import sys
from collections.abc import Iterator

import zmq
import zmq.asyncio

from ralmq.schema.codec import decode, encode
from ralmq.schema.frame import read_prefix
from ralmq.schema.message import Hello, Kind, Welcome


async def serve(url: str) -> None:
    router = zmq.asyncio.Context().socket(zmq.ROUTER)
    router.bind(url)
    workers: list[bytes] = []
    turns: Iterator[bytes] = iter(())
    askers: dict[bytes, bytes] = {}
    while True:
        peer, *frames = await router.recv_multipart()
        prefix = read_prefix(frames[0])
        if prefix.kind == Kind.REQUEST:
            askers[prefix.id] = peer
            await router.send_multipart([next(turns), *frames])
        elif prefix.kind == Kind.FINAL:
            await router.send_multipart([askers.pop(prefix.id), *frames])
        elif prefix.kind == Kind.HELLO:
            _, hello = decode(frames)
            assert isinstance(hello, Hello)
            if hello.services:
                workers.append(peer)
                turns = itertools.cycle(workers)
            await router.send_multipart([peer, *encode(Welcome(), epoch=1)])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
