"""A client as a process of its own: `python asker.py URL COUNT` asks `echo` and prints what came back, summed."""

import asyncio
import sys

import ralmq


async def main(url: str, count: int) -> None:
    async with ralmq.connect(url, wait=60) as client:
        asked = [client.request("echo", {"n": n}, wait_service=60, deadline=120) for n in range(count)]
        replies = await asyncio.gather(*asked)
    print(sum(reply.body["n"] for reply in replies))


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
