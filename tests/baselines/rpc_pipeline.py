"""Two torch.distributed.rpc workers and a master: `python rpc_pipeline.py MODEL whole|cache`, then see talk.py.

As PyTorch's own tutorial of distributed pipeline parallelism has it: each worker holds its layers behind a remote
reference, the master hands the first one's result on by reference. `whole` sends the whole context for each token;
with `cache` workers keep keys and values. The master's loop waits for each token; where it is asked for all sequences
together it starts one call for each of them, and waits for all of these before the next token. Transport is TCP:
TensorPipe's shared memory polls without pause, and three processes of that leave nothing of two cores.
"""

import os
import sys
import threading
from typing import Any

import torch
from gpt2_parts import CACHED, WHOLE, Part
from talk import Took, beside, end_with_stdin, free_port, serve
from torch.distributed import rpc


class Remote:
    """One worker's layers. The last one answers with the next token."""

    def __init__(self, path: str, place: int, first: int, last: int) -> None:
        self._last = place == 1
        self._part = Part(path, first, last, embeds=not self._last, ends=self._last)
        self._lock = threading.Lock()

    def forward(self, given: Any, cache: int | None) -> Any:
        x = given.to_here()
        with self._lock:
            hidden = self._part.forward(x, cache)
            return self._part.best(hidden) if self._last else hidden

    def forget(self) -> None:
        self._part.forget()


def master(path: str, cached: bool) -> None:
    cut = CACHED if cached else WHOLE
    spans = ((0, cut), (cut, 12))
    parts = [rpc.remote(f"worker{place}", Remote, args=(path, place, *span)) for place, span in enumerate(spans)]

    def step(number: int, ids: list[int]) -> Any:
        key = number if cached else None
        hidden = parts[0].remote().forward(rpc.RRef(torch.tensor(ids)), key)
        return parts[1].rpc_async().forward(hidden, key)

    def loop(prompts: list[list[int]], numbers: list[int], tokens: int, took: Took) -> None:
        contexts = {number: list(prompts[number]) for number in numbers}
        fed = dict.fromkeys(numbers, 0)
        for _ in range(tokens):
            calls = {}
            for number, context in contexts.items():
                calls[number] = step(number, context[fed[number] :])
                fed[number] = len(context) if cached else 0
            for number, call in calls.items():
                contexts[number].append(call.wait())
                took(number, contexts[number][-1])

    def generate(prompts: list[list[int]], tokens: int, together: bool, took: Took) -> None:
        numbers = list(range(len(prompts)))
        for some in [numbers] if together else [[number] for number in numbers]:
            loop(prompts, some, tokens, took)
        for part in parts:
            part.rpc_sync().forget()

    for part in parts:
        part.rpc_sync().forget()  # once it is loaded
    serve(generate)


def joined(name: str, rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, rpc_timeout=120, _transports=["uv"])
    rpc.init_rpc(name, rank=rank, world_size=3, rpc_backend_options=options)


def main() -> None:
    path, how, *place = sys.argv[1:]
    torch.set_num_threads(1)
    if place:
        threading.Thread(target=end_with_stdin, daemon=True).start()
        joined(f"worker{place[0]}", int(place[0]) + 1, int(place[1]))
        rpc.shutdown()
        return
    port = str(free_port())
    with beside(*[[path, how, number, port] for number in ("0", "1")]):
        joined("master", 0, int(port))
        master(path, how == "cache")


if __name__ == "__main__":
    main()
