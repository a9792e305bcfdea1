"""Asks a cluster from one of the hosts: reads jobs as lines of JSON, writes each token as it comes, and the end.

python lan_client.py URL KEYS      a job is {"prompt": [ids], ...options}, or {"status": true}
"""

import asyncio
import json
import sys
from typing import Any

import ralmq
from ralmq.client.client import Client


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def one(client: Client, job: dict[str, Any]) -> None:
    if job.pop("status", False):
        say(status=await client.status())
        return
    prompts = job.pop("prompts")

    async def text(number: int, prompt: list[int]) -> list[int]:
        tokens = []
        async for token in client.generate(prompt, model="m", deadline=120, wait_service=60, **job):
            tokens.append(token.id)
            say(text=number, token=token.id)
        return tokens

    say(texts=await asyncio.gather(*[text(number, prompt) for number, prompt in enumerate(prompts)]))


async def main() -> None:
    url, keys = sys.argv[1:]
    async with ralmq.connect(url, wait=60, keys=keys) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            await one(client, json.loads(line))


asyncio.run(main())
