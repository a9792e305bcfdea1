"""Asks the worker of shout.py, and the embedded model: `python ask.py` while `ralmq up` and the worker run."""

import asyncio
import sys

import numpy
import ralmq


async def main() -> None:
    async with ralmq.connect() as client:  # $RALMQ_BROKER, else tcp://127.0.0.1:5555
        reply = await client.request("shout", {"text": "hi"}, tensors=[numpy.zeros((2, 3))])
        print(reply.body)
        async for token in client.generate("Return a new array", model="demo", max_tokens=16):
            print(token.text, end="", flush=True)


if sys.argv[1:]:
    sys.exit("usage: python ask.py (without arguments; $RALMQ_BROKER names the broker)")
asyncio.run(main())
