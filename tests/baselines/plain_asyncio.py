"""A broker as one writes it first: zmq.asyncio, one ROUTER, whole messages, a table from request id to asker.

`python plain_asyncio.py [--poller] URL`. No credits, deadlines, fences or checks; workers take turns. With --poller it
waits in a zmq.asyncio.Poller before each message, as one does who has more than one socket.
"""

import asyncio
import itertools
import os
import sys
from collections.abc import Iterator

import zmq
import zmq.asyncio
from ralmq.schema.codec import decode, encode
from ralmq.schema.frame import read_prefix
from ralmq.schema.message import Hello, Kind, Welcome
from ralmq.workers.process import PARENT_PIPE, watch_parent


async def serve(url: str, *, polled: bool) -> None:
    router = zmq.asyncio.Context().socket(zmq.ROUTER)
    router.bind(url)
    poller = zmq.asyncio.Poller()
    poller.register(router, zmq.POLLIN)
    workers: list[bytes] = []
    turns: Iterator[bytes] = iter(())
    askers: dict[bytes, bytes] = {}
    while True:
        if polled:
            await poller.poll()
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
    if PARENT_PIPE in os.environ:
        watch_parent(int(os.environ[PARENT_PIPE]), lambda: os._exit(0))
    asyncio.run(serve(sys.argv[-1], polled="--poller" in sys.argv))
