"""Two remote linear layers and a chain of ten calls over torch.distributed.rpc: `python rpc_remote.py all|uv`.

As PyTorch's tutorials of distributed autograd and optimizers have it: results stay behind remote references, which go
from worker to worker, and a distributed optimizer steps where the parameters are. Transports are TensorPipe's own
choice (`all`) or TCP alone (`uv`): shared memory polls without pause, and costs a core each.

In, a line of JSON: {"what": "step" | "echo", "times": n, "bytes": b}. Out: {"seconds": s, "value": v}.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import torch
from talk import beside, end_with_stdin, free_port
from torch import nn
from torch.distributed import autograd, rpc
from torch.distributed.optim import DistributedOptimizer

SIZE, ROWS, CALLS, RATE = 256, 32, 10, 1e-3


class Remote:
    """A layer on a worker."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self._layer = nn.Linear(SIZE, SIZE)

    def forward(self, given: Any) -> torch.Tensor:
        x = given if isinstance(given, torch.Tensor) else given.to_here()
        return self._layer(x).tanh()

    def parameters(self) -> list[Any]:
        return [rpc.RRef(parameter) for parameter in self._layer.parameters()]

    def echo(self, x: torch.Tensor) -> torch.Tensor:
        return x


def joined(name: str, rank: int, port: int, transports: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    chosen: dict[str, Any] = {"_transports": ["uv"]} if transports == "uv" else {}
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=16, rpc_timeout=120, **chosen)
    rpc.init_rpc(name, rank=rank, world_size=3, rpc_backend_options=options)


def master() -> None:
    layers = [rpc.remote(f"worker{place}", Remote, args=(place,)) for place in range(2)]
    parameters = [found for layer in layers for found in layer.rpc_sync().parameters()]
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=RATE)
    torch.manual_seed(9)
    x = torch.randn(ROWS, SIZE)

    def step() -> float:
        with autograd.context() as context:
            given: Any = x
            for call in range(CALLS):
                given = layers[call % 2].remote().forward(given)
            loss = given.to_here().pow(2).sum()
            autograd.backward(context, [loss])
            optimizer.step(context)
        return float(loss.detach())

    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        value = 0.0
        sent = torch.zeros(asked.get("bytes", 4) // 4)
        begun = time.perf_counter()
        for _ in range(asked["times"]):
            value = step() if asked["what"] == "step" else float(layers[0].rpc_sync().echo(sent)[0])
        print(json.dumps({"seconds": time.perf_counter() - begun, "value": value}), flush=True)


def main() -> None:
    transports, *place = sys.argv[1:]
    torch.set_num_threads(1)
    if place:
        threading.Thread(target=end_with_stdin, daemon=True).start()
        joined(f"worker{place[0]}", int(place[0]) + 1, int(place[1]), transports)
        rpc.shutdown()
        return
    port = str(free_port())
    with beside(*[[transports, number, port] for number in ("0", "1")]):
        joined("master", 0, int(port), transports)
        master()


if __name__ == "__main__":
    main()
