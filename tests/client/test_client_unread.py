"""What a client has not read yet, while its event loop stands still, outlives the connection."""

import asyncio
import subprocess
import sys

from fake_broker import FakeBroker
from ralmq.schema.message import Beat
from relay import Relay
from serving import PATIENCE

STANDING = """
import asyncio, sys, time
from ralmq.client.client import connect

async def main():
    async with connect(sys.argv[1]):
        print("in", flush=True)
        time.sleep(float(sys.argv[2]))

asyncio.run(main())
"""


async def test_a_client_that_stands_still_survives_its_connection() -> None:
    """Had libzmq stopped reading at some bound of messages, its next heartbeat would abort the process."""
    with FakeBroker() as broker:
        async with Relay(broker.url) as relay:
            command = [sys.executable, "-c", STANDING, relay.url, "1.5"]
            client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                await broker.welcome(beat_ms=1000)
                assert client.stdout is not None
                assert await asyncio.to_thread(client.stdout.readline) == "in\n"
                for number in range(4000):
                    broker.send(Beat(number))
                    if number % 500 == 0:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(0.02)
                relay.reset()
                await asyncio.to_thread(client.wait, PATIENCE)
                assert client.returncode == 0
            finally:
                client.kill()
                client.communicate()
