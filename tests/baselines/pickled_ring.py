"""A ring of two nodes as MDI-LLM and tLLM first had it: `python pickled_ring.py MODEL`, then see talk.py.

One sequence a message, pickled tensors over a plain TCP connection, the whole context through all layers for each
token. Several sequences go round at once (recurrent pipelining), so that both nodes have work. The first node holds
the embedding, final norm and head, and so many layers that both have the same work.
"""

import pickle
import queue
import socket
import sys
import threading
from typing import Any

import torch
from gpt2_parts import WHOLE, Part
from talk import Took, beside, end_with_stdin, free_port, serve


class Wire:
    """Objects over one connection; what comes in is put into a queue by a thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.inbox: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, thing: Any) -> None:
        data = pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)
        self._connection.sendall(len(data).to_bytes(8, "little") + data)

    def _read(self) -> None:
        with self._connection.makefile("rb") as stream:
            while size := stream.read(8):
                self.inbox.put(pickle.loads(stream.read(int.from_bytes(size, "little"))))


def second(path: str, port: int) -> None:
    part = Part(path, 12 - WHOLE, 12, embeds=False, ends=False)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        wire = Wire(connection)
        while True:
            sample = wire.inbox.get()
            wire.send({"sample": sample["sample"], "data": part.forward(sample["data"])})


def first(path: str) -> None:
    part = Part(path, 0, 12 - WHOLE, embeds=True, ends=True)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server, beside([path, str(port)]):
        connection, _ = server.accept()
        wire = Wire(connection)

        def generate(prompts: list[list[int]], tokens: int, together: bool, took: Took) -> None:
            del together  # as many as there are
            contexts = [list(prompt) for prompt in prompts]
            waiting = len(prompts) * tokens
            for number, context in enumerate(contexts):
                wire.send({"sample": number, "data": part.forward(torch.tensor(context))})
            while waiting:
                sample = wire.inbox.get()
                number, waiting = sample["sample"], waiting - 1
                context = contexts[number]
                context.append(part.best(sample["data"]))
                took(number, context[-1])
                if len(context) < len(prompts[number]) + tokens:
                    wire.send({"sample": number, "data": part.forward(torch.tensor(context))})

        serve(generate)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        threading.Thread(target=end_with_stdin, daemon=True).start()
        second(sys.argv[1], int(sys.argv[2]))
    else:
        first(sys.argv[1])
