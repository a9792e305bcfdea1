"""What a client has not read yet, while its event loop stands still, outlives the connection."""

import asyncio
import socket
import struct
import subprocess
import sys

from fake_broker import FakeBroker
from ralmq.schema.message import Beat
from serving import PATIENCE

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST
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
        host, _, port = broker.url.removeprefix("tcp://").rpartition(":")
        between: list[asyncio.StreamWriter] = []

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner, outer = await asyncio.open_connection(host, int(port))
            between.append(writer)

            async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()

            both = (asyncio.create_task(carry(reader, outer)), asyncio.create_task(carry(inner, writer)))
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            outer.close()
            writer.close()

        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            client = subprocess.Popen([sys.executable, "-c", STANDING, url, "1.5"], stdout=subprocess.PIPE, text=True)
            try:
                await broker.welcome(beat_ms=1000)
                assert client.stdout is not None
                assert await asyncio.to_thread(client.stdout.readline) == "in\n"
                for number in range(4000):
                    broker.send(Beat(number))
                    if number % 500 == 0:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(0.02)
                (writer,) = between
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                writer.transport.abort()
                await asyncio.to_thread(client.wait, PATIENCE)
                assert client.returncode == 0
            finally:
                client.kill()
                client.communicate()
